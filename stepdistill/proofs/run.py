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
from ..errors import RequestError
from ..methods import METHODS, REGISTERED, load_method
from ..recipe import plugins as outside
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


def verify(*methods: str, seed: int = 0, out: str | Path = "verify", fast: bool = False,
           done: Callable[[list[Row]], None] = lambda rows: None, plugins: str | Path | None = None) -> dict[str, Any]:
    """Proves methods, all of ours unless named, on problems drawn from the seed: {seed, seconds, rows: [{method, kind,
    check, figure, tolerance, passed}]}.

    Writes verify.json, a picture METHOD.png and logs to `out`. fast: closed forms and contracts alone, nothing is
    trained to its end and nothing drawn. done: called with the rows of a method and a kind once
    they are measured. plugins: a folder with methods from outside, its own unless named, whose proofs/NAME.py and
    recipes/toy/NAME.yaml are read where they are; what of a method nothing proves is listed: {..., unproved: [{method,
    kind, why}]}. RequestError for an unknown method. A failing row is a row, not an error.
    """
    start, out = time.perf_counter(), Path(out)
    folder = None if plugins is None else outside.Folder.open(plugins)
    every = [name for name in METHODS if name not in REGISTERED] if folder is None else folder.names("methods")
    names = list(dict.fromkeys(methods)) or every
    for name in names:
        _found(name, folder)
    lacking = [one for name in names if name in REGISTERED for one in unproved(name, folder)]
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="work-", dir=out) as work:
        tasks = [Task(name, kind, part, seed, out, Path(work), folder) for kind in KINDS[fast:] for name in names
                 for part in _parts(name, kind, folder)]
        rows = _measured(tasks, done)
        for name in () if fast else names:
            draw([task.folder for task in tasks if (task.method, task.kind) == (name, "convergence")],
                 out / f"{name}.png")
    rows.sort(key=lambda row: (names.index(row.method), KINDS[::-1].index(row.kind)))
    found = {"seed": seed, "seconds": time.perf_counter() - start, "rows": [asdict(row) for row in rows]} | (
        {"unproved": lacking} if lacking else {})
    (out / RESULTS).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return found


@dataclass(frozen=True)
class Task:
    """What one process measures. part: of a convergence the Toy recipe, else the method. plugins: where its method may
    lie."""

    method: str
    kind: str
    part: str
    seed: int
    out: Path
    work: Path
    plugins: outside.Folder | None = None

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


def _found(method: str, folder: outside.Folder | None) -> None:
    """RequestError for a method that is unknown, and for one that other processes could not find."""
    outside.load("methods", method, METHODS, folder)
    load_method(method)
    if method in REGISTERED and outside.mark_of("methods", method) is None:
        raise RequestError(f"{method} was registered in this process, and others measure it: put it into a folder "
                           f"as methods/{method}.py, and give that as plugins")


def unproved(method: str, folder: outside.Folder | None) -> list[dict[str, str]]:
    """What nothing proves of a method from outside: [{method, kind, why}]."""
    place = "its package" if folder is None else str(folder.path)
    missing = {"identity": None if _proofs(method, folder) else f"{place} has no proofs/{method}.py",
               "convergence": None if recipes(method, folder) else f"{place} has no recipes/toy/{method}.yaml"}
    return [{"method": method, "kind": kind, "why": why} for kind, why in missing.items() if why]


def _proofs(method: str, folder: outside.Folder | None) -> Path | None:
    return None if folder is None else folder.file("proofs", method)


def _parts(method: str, kind: str, folder: outside.Folder | None) -> list[str]:
    """What of a kind is measured by itself: each Toy recipe, else all at once."""
    if kind == "convergence":
        return recipes(method, folder)
    return [] if kind == "identity" and method in REGISTERED and not _proofs(method, folder) else [method]


def measure(task: Task) -> list[Row]:
    """Its rows, in this process; what the work prints goes to a log beside the results."""
    torch.set_num_threads(1)
    os.environ["STEPDISTILL_CACHE"] = str(task.work / "cache")
    rows = []
    file = task.out / "logs" / f"{task.name}.log"
    with file.open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        api.quiet()
        try:
            outside.load("methods", task.method, METHODS, task.plugins)
            for check in _checks(task):
                figure = check.figure if isfinite(check.figure) else None
                rows.append(Row(task.method, task.kind, check.name, figure, check.tolerance, check.passed))
        except Exception as error:               # a method that breaks is a row that fails, and the others go on
            traceback.print_exc()
            rows.append(Row(task.method, task.kind, f"could not be measured: {type(error).__name__}: {error}",
                            None, 0.0, False))
    return rows


def _checks(task: Task) -> Iterator[Check]:
    folder = task.plugins
    if task.kind == "convergence":
        yield from convergence(task.part, task.seed, task.folder, folder)
    elif task.kind == "contract":
        yield from contract(task.method, task.seed, task.folder, folder)
    else:
        proofs = (folder.module("proofs", task.method) if task.method in REGISTERED
                  else import_module(f"{__package__}.{task.method}"))
        identities = proofs.identities
        for noise in NAMES:
            for check in identities(Problem(task.seed, noise)):
                yield replace(check, name=f"{check.name} ({noise})")
