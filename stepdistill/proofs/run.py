"""`stepdistill verify`: every method's rows, measured in processes of one thread each."""
from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .. import build
from ..methods import METHODS, load_method
from .contract import contract
from .convergence import convergence, draw, recipes
from .problem import NAMES, Check, Problem

KINDS = ("convergence", "contract", "identity")       # the long ones first
RESULTS, WORK = "verify.json", "work"
PROCESSES = 8                                         # at most; one a core


@dataclass(frozen=True)
class Row:
    """figure <= tolerance is what passes. A check that could not be made has the figure infinity, and says why in its name."""

    method: str
    kind: str
    check: str
    figure: float
    tolerance: float
    passed: bool


def verify(*methods: str, seed: int = 0, out: str | Path = "verify", done: Callable[[list[Row]], None] = lambda rows: None) -> dict[str, Any]:
    """Proves methods, all unless named, on problems drawn from the seed: {seed, seconds, rows: [{method, kind, check, figure,
    tolerance, passed}]}.

    Writes verify.json, a picture METHOD.png and logs to `out`. done: called with the rows of a method and a kind once they are measured. RequestError
    for an unknown method. A failing row is a row, not an error.
    """
    start, out = time.perf_counter(), Path(out)
    for name in methods:
        load_method(name)
    names = list(methods) or list(METHODS)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(measure, name, kind, part, seed, out) for kind in KINDS for name in names for part in _parts(name, kind)]
        for task in as_completed(tasks):
            done(task.result())
            rows += task.result()
    for name in names:
        draw([_folder(out, part, "convergence") for part in recipes(name)], out / f"{name}.png")
    shutil.rmtree(out / WORK, ignore_errors=True)
    rows.sort(key=lambda row: (names.index(row.method), KINDS[::-1].index(row.kind)))
    found = {"seed": seed, "seconds": time.perf_counter() - start, "rows": [asdict(row) for row in rows]}
    (out / RESULTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _parts(method: str, kind: str) -> list[str]:
    """What of a kind is measured by itself: each Toy recipe, else all at once."""
    return recipes(method) if kind == "convergence" else [method]


def _folder(out: Path, part: str, kind: str) -> Path:
    return out / WORK / f"{part.replace('/', '-')}-{kind}"


def measure(method: str, kind: str, part: str, seed: int, out: Path) -> list[Row]:
    """The rows of one kind and part, in this process; what the work prints goes to a log beside the results."""
    torch.set_num_threads(1)
    os.environ["STEPDISTILL_CACHE"] = str(out / WORK / "cache")
    rows = []
    with (out / "logs" / f"{part.replace('/', '-')}-{kind}.log").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        build.quiet()
        try:
            for check in _checks(method, kind, part, seed, _folder(out, part, kind)):
                rows.append(Row(method, kind, check.name, check.figure, check.tolerance, check.passed))
        except Exception as error:                        # a method that breaks is a row that fails, and the others go on
            traceback.print_exc()
            rows.append(Row(method, kind, f"could not be measured: {type(error).__name__}: {error}", float("inf"), 0.0, False))
    return rows


def _checks(method: str, kind: str, part: str, seed: int, work: Path) -> Iterator[Check]:
    shutil.rmtree(work, ignore_errors=True)
    if kind == "convergence":
        yield from convergence(part, seed, work)
    elif kind == "contract":
        yield from contract(method, seed, work)
    else:
        identities = import_module(f"{__package__}.{method}").identities
        for noise in NAMES:
            for check in identities(Problem(seed, noise)):
                yield replace(check, name=f"{check.name} ({noise})")
