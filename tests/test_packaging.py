"""The wheel carries recipes and assets, and works far from the checkout."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out,
                    ROOT], check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel; its dependencies come from this interpreter's environment."""
    out = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", out, wheel], check=True)
    return out


def installed(site: Path, cwd: Path, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(site), "STEPDISTILL_CACHE": str(cwd / "cache")})


def test_the_wheel_holds_code_types_recipes_and_assets(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("stepdistill/py.typed", "stepdistill/_share/recipes/shapes/lcm.yaml",
                   "stepdistill/_share/assets/shapes-clip/tokenizer.json"):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/")) or "/students/" in name]


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size <= 25e6


@pytest.mark.long
def test_a_wheel_says_how_to_get_the_students(site, tmp_path):
    student = "assets/students/shapes-lcm"
    done = installed(site, tmp_path, "-m", "stepdistill", "sample", student, "--prompt", "a red ring")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"""loading torch and diffusers
error: {student} lies in the repository and not in the installed package. \
Clone it and name the folder there:
  git clone --depth 1 https://github.com/stepdistill/stepdistill
  stepdistill sample stepdistill/assets/students/shapes-lcm --prompt "..."
or train it, and name the run:
  stepdistill train shapes/lcm --out runs/shapes-lcm
  stepdistill sample runs/shapes-lcm --prompt "..."
"""
    other = installed(site, tmp_path, "-m", "stepdistill", "bench", "assets/students/shapes-tcd")
    assert other.returncode == 2
    assert "there is no student assets/students/shapes-tcd: the repository holds shapes-lcm" in other.stderr


def test_every_pin_is_a_public_version():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.split(";")[0].strip().partition("==")
            assert name and version and "+" not in version and "/" not in line, line


def test_the_installed_wheel_trains(site, tmp_path, tiny_teacher):
    output = installed(site, tmp_path, "-c", "import stepdistill, stepdistill.resources as r; "
                                           "print(stepdistill.__file__); print(r.locate('recipes/shapes/lcm.yaml'))")
    assert [Path(line).is_relative_to(site) for line in output.stdout.split()] == [True, True], output
    rows = json.loads(installed(site, tmp_path, "-m", "stepdistill", "recipes", "--json").stdout)
    assert "shapes/lcm-demo" in [row["name"] for row in rows]
    done = installed(site, tmp_path, "-m", "stepdistill", "train", "shapes/lcm-demo", "--out", "run", "--set",
                     f"teacher={tiny_teacher}",
                     "--set", "train.updates=2", "--set", "data.count=16", "--set", "data.batch=4")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run/checkpoints").glob("step-000002"))


def test_both_names_of_the_package_answer(site, tmp_path):
    for command in (("-m", "stepdistill", "--version"),
                    ("-c", "from importlib.metadata import version; print(version('stepdistill'))")):
        assert installed(site, tmp_path, *command).stdout.strip() == "0.1.0"


def test_the_face(site, tmp_path):
    """train, sample, bench, export, load come with the first use; `export` is also the name of a package."""
    code = ("import sys, stepdistill\nassert 'torch' not in sys.modules\n"
            "assert all(callable(getattr(stepdistill, name)) for name in stepdistill.__all__)\n"
            "import stepdistill.export.folder\nassert callable(stepdistill.export) and stepdistill.export.folder.load "
            "is stepdistill.load\ntry: stepdistill.export('nowhere')\nexcept stepdistill.RequestError as error: "
            "print(error)\ntry: stepdistill.trian\nexcept AttributeError as error: print(error)")
    done = installed(site, tmp_path, "-c", code)
    assert "nowhere is no run folder" in done.stdout and "'trian'" in done.stdout, done
