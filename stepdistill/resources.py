"""What ships beside the code: recipes and assets, at the top of a checkout or inside the installed package."""
from __future__ import annotations

import re
from pathlib import Path

from .errors import RequestError

PACKAGE = Path(__file__).resolve().parent
SHARE = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else PACKAGE / "_share"
REPOSITORY = "https://github.com/stepdistill/stepdistill"
STUDENTS = {"shapes-lcm": "shapes/lcm", "shapes-dmd2": "shapes/dmd2", "shapes-dmd2-1step": "shapes/dmd2-1step",
            "shapes-sd3-dmd2": "shapes-sd3/dmd2"}
"""Folders of assets/students, which lie in the repository and not in a wheel, and the recipes that train them."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def locate(name: str | Path) -> Path | None:
    """A file or folder by its path from here, else by its path among what ships (`recipes/...`, `assets/...`).

    Absolute. None where there is neither.
    """
    for place in (Path.cwd(), SHARE):
        if (place / name).exists():
            return (place / name).resolve()
    return None


def portable(name: str) -> str:
    """A path that holds from any folder: what ships keeps its name, other files get their absolute path, the rest (Hub
    ids) stays."""
    found = locate(name)
    return name if found is None or found == (SHARE / name).resolve() else str(found)


def share(folder: Path) -> None:
    """Gives every file under a folder the rights that the umask gives a new one. safetensors writes its files for their
    owner alone."""
    probe = folder / ".rights"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(mode)


def named(place: str) -> str:
    """A place as it may be told to others: what ships by its name, a folder or file of one's own by its own name
    alone."""
    path = Path(place)
    if path.is_relative_to(SHARE):
        return path.relative_to(SHARE).as_posix()
    return path.name if path.exists() else place


def is_hub_id(name: str) -> bool:
    """Whether a name can only be one of the Hub: it is spelled as one, and there is no such folder here."""
    return _HUB_ID.fullmatch(name) is not None and locate(name) is None and locate(Path(name).parts[0]) is None


def pipeline(name: str) -> str:
    """Where a diffusers pipeline is to be loaded from: an absolute path, or a Hub id as it stands.

    RequestError where `name` can only be a folder and there is none.
    """
    found = locate(name)
    if found is not None:
        return str(found)
    if is_hub_id(name):
        return name
    if Path(name).parts[:2] == ("assets", "students"):
        raise RequestError(_how_to_get(Path(name).name))
    raise RequestError(f"there is no pipeline at '{name}': expected a folder with a model_index.json, a single "
                       ".safetensors "
                       f"file, or a Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5 (looked in {Path.cwd()} "
                       f"and {SHARE})")


def _how_to_get(student: str) -> str:
    """What to do about a student of assets/students that is not here."""
    if student not in STUDENTS:
        return (f"there is no student assets/students/{student}: the repository holds {', '.join(STUDENTS)}. "
                "The others are trained by their recipes, which `stepdistill recipes` lists")
    recipe, run = STUDENTS[student], f"runs/{student}"
    return (f"assets/students/{student} lies in the repository and not in the installed package. "
            "Clone it and name the folder there:\n"
            f"  git clone --depth 1 {REPOSITORY}\n"
            f"  stepdistill sample stepdistill/assets/students/{student} --prompt \"...\"\n"
            f"or train it, and name the run:\n"
            f"  stepdistill train {recipe} --out {run}\n"
            f"  stepdistill sample {run} --prompt \"...\"")
