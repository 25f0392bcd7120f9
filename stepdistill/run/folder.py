"""A run folder: where it lies, what begins it, and how a run is found again."""
from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from torch import Tensor

from .. import __version__, parallel
from ..errors import RequestError, redacted
from ..evaluation.report import read_results
from ..files.lock import LOCK, locked
from ..files.whole import PARTIAL, sweep, write_whole
from ..recipe import Recipe
from ..recipe.plugins import BROUGHT
from ..training import checkpoints
from .resuming import CHANGES, RECIPE, STAGES, resumed
from .telling import FILE as LOG

ENVIRONMENT, RESULTS, SAMPLES = "environment.json", "results.json", "samples"
BEGUN = (RECIPE, ENVIRONMENT, "metrics.jsonl", "timings.jsonl", "evaluations.jsonl", "signals.jsonl", "signals.png",
         "tensorboard", "wandb", "wandb.id",
         SAMPLES, "checkpoints", STAGES, CHANGES,
         LOG, LOCK)
"""What a run writes before its first checkpoint."""
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


def place(recipe: Recipe, out: str | Path | None, resume: bool | Literal["auto"]) -> tuple[Path, Recipe, bool]:
    """(the folder of a run: `out`, or runs/<recipe>-<time>; the recipe to train; whether to go on with what lies
    there).

    resume: go on with the run there; "auto": if there is one. RequestError where the folder holds what must not be
    touched. Nothing is written yet. Every rank gets the same answer.
    """
    if out is None:
        if resume:
            raise RequestError("--resume goes on with a run: say which by --out, such as --out "
                               "runs/lcm-20260101-120000")
        now = int(parallel.gather(torch.tensor([int(time.time())]))[0])
        return Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}", recipe, False
    run = Path(out)
    going_on = resume is True or resume == "auto" and is_run(run) and _has_saved(run)
    if going_on:
        return run, _may_resume(run, recipe), True
    _may_begin(run)
    return run, recipe, False


def _may_begin(run: Path) -> None:
    """A folder may hold what a run wrote before its first checkpoint: nothing is lost with that."""
    if run.is_file():
        raise RequestError(f"{run} is a file, and a run is a folder: choose another --out")
    if _has_saved(run):
        raise RequestError(f"{run} holds a run already: go on with it by --resume, or choose another --out")
    if others := sorted(path.name for path in (run.iterdir() if run.is_dir() else ()) if not _is_ours(path)):
        raise RequestError(f"{run} holds other files ({', '.join(others[:3])}): choose another --out")


def _has_saved(run: Path) -> bool:
    """Whether there is a checkpoint, of any stage."""
    return any(checkpoints.found(place) for place in (run, *run.glob(f"{STAGES}/*")))


def _is_ours(path: Path) -> bool:
    return path.name in BEGUN or path.name.startswith(".") and path.name.endswith(PARTIAL)


def _may_resume(run: Path, recipe: Recipe) -> Recipe:
    if run.resolve().parent.name == STAGES and is_run(whole := run.resolve().parent.parent):
        raise RequestError(f"{run} is a stage of {whole}: resume that run")
    if not (run / RECIPE).is_file():
        raise RequestError(f"{run} holds no run that could be resumed: it has no {RECIPE}. Leave --resume out to begin "
                           "one")
    return resumed(run, recipe)


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Holds the folder of a run, and clears what killed writes left there. RequestError where another process holds
    it."""
    with locked(run / LOCK, str(run)):
        for place in (run, *run.glob(f"{STAGES}/*")):
            for folder in (place, place / "checkpoints", place / SAMPLES):
                sweep(folder)
        yield


def stage_folders(recipe: Recipe, run: Path) -> list[Path]:
    """Where its stages lie: the last in the run's own folder, those before in stages/1, stages/2, ..., each a run of
    its own."""
    return [*(run / STAGES / str(i + 1) for i in range(len(recipe.stages) - 1)), run]


def finished(run: Path, recipe: Recipe) -> bool:
    """Whether a stage is trained to its end, and shown."""
    folder = checkpoints.latest(run)
    return (folder is not None and checkpoints.step_of(folder) == recipe.train.updates
            and picture_of(run, recipe.train.updates).is_file())


def picture_of(run: Path, step: int) -> Path:
    """The picture of a step of training."""
    return run / SAMPLES / f"step-{step:06d}.png"


def begin(run: Path, recipe: Recipe, device: torch.device) -> None:
    """Writes what a run starts from: the resolved recipe, and the machine. Whatever a run before it wrote, that came to
    no checkpoint, goes. The recipe comes last: with it the folder is a run."""
    parallel.barrier()                    # every rank has found the folder to be free
    if parallel.rank() == 0:
        for name in BEGUN[:-1]:                                    # its recipe first
            path = run / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        write_whole(run / ENVIRONMENT, (json.dumps(environment(device), indent=1) + "\n").encode())
        write_whole(run / RECIPE, recipe.dump().encode())


def environment(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": [redacted(argument) for argument in sys.argv],
            "python": platform.python_version(), "platform": platform.platform(), "device": f"{device.type}: {name}",
            "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "ranks": parallel.world_size(),
            "packages": {"stepdistill": __version__} | {name: version(name) for name in PACKAGES}} | (
        {"plugins": {"/".join(named): found.mark for named, found in BROUGHT.items()}} if BROUGHT else {})


def moment(device: torch.device) -> dict[str, Any]:
    """Where and when something is measured."""
    here = environment(device)
    return {"date": here["started"], "device": here["device"], "threads": here["threads"], "command": here["command"],
            "versions": here["packages"]}


def resumption(run: Path) -> str:
    """The command that goes on with a run."""
    return f"stepdistill train {quote(str(run / RECIPE))} --out {quote(str(run))} --resume"


def is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file()


def recipe_of(run: Path) -> Recipe:
    if not is_run(run):
        raise RequestError(f"{run} is no run folder: it holds no {RECIPE}; `stepdistill train RECIPE --out "
                           f"{quote(str(run))}` makes one")
    return Recipe.load(run / RECIPE)


def results_of(run: Path) -> dict[str, Any] | None:
    """What a bench wrote into the run's folder, if there was one."""
    path = run / RESULTS
    return read_results(path) if path.is_file() else None


def state_of(run: Path, role: str, step: int | None = None) -> tuple[Path, dict[str, Tensor]]:
    """(the newest checkpoint whose file of a role is whole, that role's state). Those that are damaged are named in a
    warning. step: that of a checkpoint that is asked for.

    RequestError where there is none.
    """
    if step is not None:
        kept = {checkpoints.step_of(place): place for place in checkpoints.found(run)}
        if step not in kept:
            raise RequestError(f"{run} has no checkpoint of step {step}; it has those of "
                               f"{', '.join(map(str, sorted(kept))) or 'none'} (train.checkpoint_every and train.keep "
                               "say which are kept)")
        return kept[step], checkpoints.load_role(kept[step], role)
    found = checkpoints.newest(run, lambda folder: checkpoints.load_role(folder, role))
    if found is None:
        raise RequestError(f"{run} has no checkpoint yet: train on with `{resumption(run)}`")
    return found
