"""`stepdistill verify`: every method's rows, measured in processes of one thread each."""
from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .. import api
from ..methods import METHODS, load_method
from .contract import contract
from .convergence import convergence, draw, recipes
from .problem import NAMES, Check, Problem

KINDS = ("convergence", "contract", "identity")       # the long ones first
RESULTS = "verify.json"
PROCESSES = 8                                         # at most; one a core


@dataclass(frozen=True)
class Row:
    """figure <= tolerance is what passes. A check that could not be made, or gave no finite number, has no figure; of
    the former the name says why."""

    method: str
    kind: str
    check: str
    figure: float | None
    tolerance: float
    passed: bool


def verify(*methods: str, seed: int = 0, out: str | Path = "verify",
           done: Callable[[list[Row]], None] = lambda rows: None) -> dict[str, Any]:
    """Proves methods, all unless named, on problems drawn from the seed: {seed, seconds, rows: [{method, kind, check,
    figure, tolerance, passed}]}.

    Writes verify.json, a picture METHOD.png and logs to `out`. done: called with the rows of a method and a kind once
    they are measured. RequestError for an unknown method. A failing row is a row, not an error.
    """
    start, out = time.perf_counter(), Path(out)
    for name in methods:
        load_method(name)
    names = list(dict.fromkeys(methods)) or list(METHODS)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="work-", dir=out) as work:
        tasks = [Task(name, kind, part, seed, out, Path(work)) for kind in KINDS for name in names
                 for part in _parts(name, kind)]
        rows = _measured(tasks, done)
        for name in names:
            draw([task.folder for task in tasks if (task.method, task.kind) == (name, "convergence")],
                 out / f"{name}.png")
    rows.sort(key=lambda row: (names.index(row.method), KINDS[::-1].index(row.kind)))
    found = {"seed": seed, "seconds": time.perf_counter() - start, "rows": [asdict(row) for row in rows]}
    (out / RESULTS).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return found


@dataclass(frozen=True)
class Task:
    """What one process measures. part: of a convergence the Toy recipe, else the method."""

    method: str
    kind: str
    part: str
    seed: int
    out: Path
    work: Path

    @property
    def name(self) -> str:
        return f"{self.part.replace('/', '-')}-{self.kind}"

    @property
    def folder(self) -> Path:
        return self.work / self.name


def _measured(tasks: list[Task], done: Callable[[list[Row]], None]) -> list[Row]:
    """The rows of all tasks, as they come. An interruption ends the processes with it."""
    rows: list[Row] = []
    pool = ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), multiprocessing.get_context("spawn"))
    try:
        for finished in as_completed([pool.submit(measure, task) for task in tasks]):
            done(finished.result())
            rows += finished.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
        raise
    pool.shutdown()
    return rows


def _parts(method: str, kind: str) -> list[str]:
    """What of a kind is measured by itself: each Toy recipe, else all at once."""
    return recipes(method) if kind == "convergence" else [method]


def measure(task: Task) -> list[Row]:
    """Its rows, in this process; what the work prints goes to a log beside the results."""
    torch.set_num_threads(1)
    os.environ["STEPDISTILL_CACHE"] = str(task.work / "cache")
    rows = []
    with (task.out / "logs" / f"{task.name}.log").open("w",
                                                       encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        api.quiet()
        try:
            for check in _checks(task):
                figure = check.figure if isfinite(check.figure) else None
                rows.append(Row(task.method, task.kind, check.name, figure, check.tolerance, check.passed))
        except Exception as error:                        # a method that breaks is a row that fails, and the others go
                                                          # on
            traceback.print_exc()
            rows.append(Row(task.method, task.kind, f"could not be measured: {type(error).__name__}: {error}",
                            None, 0.0, False))
    return rows


def _checks(task: Task) -> Iterator[Check]:
    if task.kind == "convergence":
        yield from convergence(task.part, task.seed, task.folder)
    elif task.kind == "contract":
        yield from contract(task.method, task.seed, task.folder)
    else:
        identities = import_module(f"{__package__}.{task.method}").identities
        for noise in NAMES:
            for check in identities(Problem(task.seed, noise)):
                yield replace(check, name=f"{check.name} ({noise})")
