"""Real trainings that are killed at moments drawn from a seed, gone on with, and compared with a run left alone."""
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from stepdistill.training import checkpoints

ROOT = Path(__file__).parents[1]
TIMINGS = ("latency_ms", "images_per_s")           # of a row of evaluations.jsonl: of the moment, not of the run


@dataclass(frozen=True)
class Moment:
    """When to strike: once so many rows, checkpoints and pictures are there, and then so many seconds later."""

    rows: int
    checkpoints: int
    pictures: int
    seconds: float

    @classmethod
    def drawn(cls, draw: random.Random, updates: int, saves: int, shows: int) -> Moment:
        """Of all that a run writes: at any row, at the end of any save, at any picture; up to a quarter of a second
        after."""
        kind = draw.choice(("rows", "checkpoints", "pictures"))
        most = {"rows": updates, "checkpoints": saves, "pictures": shows}[kind]
        return cls(**{"rows": 0, "checkpoints": 0, "pictures": 0} | {kind: draw.randint(0, most)},
                   seconds=draw.choice((0, draw.random() / 4)))

    def has_come(self, run: Path) -> bool:
        log = run / "metrics.jsonl"
        rows = log.read_bytes().count(b"\n") if log.is_file() else 0
        return (run.is_dir() and rows >= self.rows and len(checkpoints.found(run)) >= self.checkpoints
                and len(list(run.glob("samples/step-*.png"))) >= self.pictures)


def train(arguments: Sequence[object], run: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                "STEPDISTILL_CACHE": str(run.parent / "cache"), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "stepdistill", "train", *map(str, arguments), "--out", str(run),
               "--resume", "auto"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def struck(arguments: Sequence[object], run: Path, moments: Sequence[Moment],
           sent: signal.Signals = signal.SIGKILL) -> list[int]:
    """Trains `run` to its end, in spite of a signal at each of the moments. The steps at which the processes began."""
    began = []
    for moment in moments:
        saved = checkpoints.latest(run)
        began.append(0 if saved is None else checkpoints.step_of(saved))
        process = train(arguments, run)
        while process.poll() is None and not moment.has_come(run):
            time.sleep(0.002)
        time.sleep(moment.seconds)
        process.send_signal(sent)
        process.communicate()
    last = train(arguments, run)
    _, said = last.communicate(timeout=500)
    assert last.returncode == 0, said[-3000:]
    return began


# -- at a call that writes ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Work:
    """A command that is killed, and given again until it is done. arguments(folder): of the command, whose outcome lies
    in the folder; processes: of torchrun; same(whole, other): what differs between the outcomes of two folders."""

    name: str
    arguments: Callable[[Path], Sequence[object]]
    same: Callable[[Path, Path], list[str]]
    processes: int = 1

    def run(self, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess:
        """Once, in a folder of its own with a cache of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        start = ["-m"] if self.processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                                                    str(self.processes), "-m"]
        own = {"PYTHONPATH": f"{ROOT / 'tests/strikes'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1",
               "STEPDISTILL_CACHE": str(folder / "cache"),
               "NO_COLOR": "1", "ACCELERATE_USE_CPU": "true"}
        return subprocess.run([sys.executable, *start, "stepdistill", *map(str, self.arguments(folder))],
                              env=os.environ | own | environment, cwd=folder,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              timeout=570)


def counted(work: Work, folder: Path) -> dict[str, int]:
    """Runs a work whole. How many calls of each kind there were that could be struck."""
    done = work.run(folder, {"STRIKES": str(folder.with_suffix(".json"))})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(folder.with_suffix(".json").read_text())


def strike(work: Work, whole: Path, counts: Mapping[str, int], folder: Path, draw: random.Random,
           most: int = 3) -> tuple[list[str], list[str]]:
    """Up to `most` kills at calls drawn from those that there are, and then to the end: (where it was struck, what
    differs then)."""
    struck = []
    for _ in range(draw.randint(1, most)):
        kind = draw.choices([*counts], [*counts.values()])[0]
        at = f"{kind} {draw.randint(1, counts[kind])}"
        if work.run(folder, {"STRIKE": at}).returncode != 0:
            struck.append(at)
    last = work.run(folder, {})
    return struck, [last.stderr[-2000:]] if last.returncode else work.same(whole, folder)


def of_runs(whole: Path, other: Path) -> list[str]:
    return differences(whole / "run", other / "run")


def of_tensors(whole: Path, other: Path) -> list[str]:
    """Files of tensors under both folders, but for what is hidden: the same names, the same numbers."""
    found = [{path.relative_to(folder).as_posix(): load_file(path) for path in folder.rglob("*.safetensors")}
             for folder in (whole / "made", other / "made")]
    names = found[0].keys() ^ found[1].keys()
    left = [f"left: {path}" for folder in (whole, other) for path in folder.rglob("*.partial")]
    return sorted(names) + left + [f"{name}: {key}" for name in found[0].keys() & found[1].keys()
                                   for key in found[0][name].keys() | found[1][name].keys()
                                   if not torch.equal(found[0][name].get(key, torch.empty(0)),
                                                      found[1][name].get(key, torch.empty(0)))]


def of_benches(whole: Path, other: Path) -> list[str]:
    """Their rows, but for what is of the moment."""
    rows = [[{key: value for key, value in row.items() if key not in (*TIMINGS, "made")}
             for row in json.loads((folder / "made/results.json").read_text())["rows"]]
            for folder in (whole, other)]
    return ["rows of results.json"] * (rows[0] != rows[1]) + [f"left: {path}" for path in other.rglob("*.partial")]


# -- two runs ----------------------------------------------------------------------------------------------------------

def differences(one: Path, other: Path) -> list[str]:
    """What of two finished runs is not the same: weights, optimizers, metrics, pictures, evaluations, and what should
    not be there."""
    newest = [checkpoints.latest(run) for run in (one, other)]
    states = [checkpoints.load(folder) for folder in newest]
    found = [] if newest[0].name == newest[1].name else [f"{newest[0].name} and {newest[1].name}"]
    for part in states[0].keys() | states[1].keys():
        tensors = [state.get(part, {}) for state in states]
        found += [f"{part}: {name}" for name in tensors[0].keys() | tensors[1].keys()
                  if name not in tensors[0] or name not in tensors[1]
                  or not torch.equal(tensors[0][name], tensors[1][name])]
    for name in ("metrics.jsonl", "recipe.yaml"):
        found += [name] if (one / name).read_bytes() != (other / name).read_bytes() else []
    pictures = [{path.name: path.read_bytes() for path in run.glob("samples/*")} for run in (one, other)]
    found += [f"picture {name}" for name in pictures[0].keys() | pictures[1].keys()
              if pictures[0].get(name) != pictures[1].get(name)]
    found += ["evaluations.jsonl"] if evaluations(one) != evaluations(other) else []
    return found + [f"left: {path}" for run in (one, other) for path in run.rglob("*")
                    if path.name.startswith((".", "damaged-"))]


def evaluations(run: Path) -> list[dict]:
    path = run / "evaluations.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]
