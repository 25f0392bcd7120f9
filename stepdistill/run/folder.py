"""A run folder: where it lies, what begins it, and how a run is found again."""
from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__, parallel, resources
from ..data.cache import flat
from ..errors import RequestError
from ..models.sources import cached_file
from ..recipe import Recipe
from ..training import checkpoints

RECIPE, ENVIRONMENT, RESULTS, STAGES = "recipe.yaml", "environment.json", "results.json", "stages"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


def place(recipe: Recipe, out: str | Path | None, resume: bool) -> Path:
    """The folder of a run: `out`, or runs/<recipe>-<time>. RequestError where it holds what must not be touched.

    Nothing is written yet. Every rank gets the same answer.
    """
    if out is None:
        if resume:
            raise RequestError("--resume goes on with a run: say which by --out, such as --out runs/lcm-20260101-120000")
        now = int(parallel.gather(torch.tensor([int(time.time())]))[0])
        return Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"
    run = Path(out)
    if resume:
        _may_resume(run, recipe)
    elif run.is_file() or run.is_dir() and any(run.iterdir()):
        held = "a run already: go on with it by --resume" if (run / RECIPE).is_file() else "other files"
        raise RequestError(f"{run} holds {held}, or choose another --out")
    return run


def _may_resume(run: Path, recipe: Recipe) -> None:
    if run.resolve().parent.name == STAGES and is_run(whole := run.resolve().parent.parent):
        raise RequestError(f"{run} is a stage of {whole}: resume that run")
    if not (run / RECIPE).is_file():
        raise RequestError(f"{run} holds no run that could be resumed: it has no {RECIPE}. Leave --resume out to begin "
                           "one")
    begun, asked = (flat(_numbered(r.resolved())) for r in (Recipe.load(run / RECIPE), recipe))
    changed = [f"{key} was {begun.get(key)!r}, now {asked.get(key)!r}" for key in begun | asked
               if begun.get(key) != asked.get(key)]
    if changed:
        raise RequestError(f"{run} was begun with another recipe: {'; '.join(changed)}. Resume with {run / RECIPE}, "
                           "or begin a new run with another --out")


def _numbered(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe with its stages by number, so that a difference is named by its entry."""
    return plain | ({STAGES: {str(i + 1): table for i, table in enumerate(plain[STAGES])}} if STAGES in plain else {})


def stage_folders(recipe: Recipe, run: Path) -> list[Path]:
    """Where its stages lie: the last in the run's own folder, those before in stages/1, stages/2, ..., each a run of
    its own."""
    return [*(run / STAGES / str(i + 1) for i in range(len(recipe.stages) - 1)), run]


def finished(run: Path, recipe: Recipe) -> bool:
    folder = checkpoints.latest(run)
    return folder is not None and checkpoints.step_of(folder) == recipe.train.updates


def begin(run: Path, recipe: Recipe, device: torch.device) -> None:
    """Writes what a run starts from: the resolved recipe, and the machine."""
    parallel.barrier()                    # every rank has found the folder to be free
    if parallel.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / ENVIRONMENT).write_text(json.dumps(environment(device), indent=1) + "\n", encoding="utf-8")
        (run / RECIPE).write_text(recipe.dump(), encoding="utf-8")


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with the commit of a Hub teacher: the one that the cache holds, since it was loaded a moment ago."""
    teacher = recipe.teacher
    if resources.locate(teacher.base) is not None:
        return recipe
    index = cached_file(teacher.base, "model_index.json", teacher.revision)
    return recipe if index is None else recipe.pinned(index.parent.name)


def environment(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": sys.argv,
            "python": platform.python_version(), "platform": platform.platform(), "device": f"{device.type}: {name}",
            "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "ranks": parallel.world_size(),
            "packages": {"stepdistill": __version__} | {name: version(name) for name in PACKAGES}}


def moment(device: torch.device) -> dict[str, Any]:
    """Where and when something is measured."""
    here = environment(device)
    return {"date": here["started"], "device": here["device"], "threads": here["threads"], "command": here["command"], "versions": here["packages"]}


def resumption(run: Path) -> str:
    """The command that goes on with a run."""
    return f"stepdistill train {shlex.quote(str(run / RECIPE))} --out {shlex.quote(str(run))} --resume"


def is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file()


def recipe_of(run: Path) -> Recipe:
    if not is_run(run):
        raise RequestError(f"{run} is no run folder: it holds no {RECIPE}; `stepdistill train RECIPE --out "
                           f"{shlex.quote(str(run))}` "
                           "makes one")
    return Recipe.load(run / RECIPE)


def results_of(run: Path) -> dict[str, Any] | None:
    """What a bench wrote into the run's folder, if there was one."""
    path = run / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def checkpoint_of(run: Path) -> Path:
    folder = checkpoints.latest(run)
    if folder is None:
        raise RequestError(f"{run} has no checkpoint yet: train on with `{resumption(run)}`")
    return folder
