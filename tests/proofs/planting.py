"""Faults that are planted in the text of a module, and whether a method's rows notice."""
from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from stepdistill.methods import METHODS
from stepdistill.proofs.paths import rows
from stepdistill.proofs.problem import NAMES, Check, Problem

SEED = 5                                                        # of the problems in whose rows faults are looked for
PARTS = ("__code__", "__defaults__", "__kwdefaults__")          # of a function, what a fault can change


@dataclass(frozen=True)
class Fault:
    """`old` of the module's text, wherever its lines break, replaced by `new`, to be noticed in the rows of each of
    `methods`.

    module is relative to the package. `old` occurs once unless `count` says otherwise.
    """

    name: str
    module: str
    old: str
    new: str
    methods: tuple[str, ...]
    count: int = 1

    @property
    def pattern(self) -> re.Pattern:
        inner = r"\s+".join(map(re.escape, self.old.split()))
        before, after = self.old[:-len(self.old.lstrip())], self.old[len(self.old.rstrip()):]
        return re.compile(re.escape(before) + inner + re.escape(after))

    def __str__(self) -> str:
        return f"{self.module.rsplit('.', 1)[-1]}: {self.name}"


def of(method: str, name: str, old: str, new: str, count: int = 1) -> Fault:
    """A fault of a method's own file, to be noticed in its own rows."""
    return Fault(name, f"methods.{METHODS[method].module}", old, new, (method,), count)


def plant(monkeypatch, fault: Fault) -> None:
    """Puts the changed code into the functions that are there, so that it is found wherever they were imported to.

    AssertionError where the text is no longer there, or where no function changes: write the fault anew.
    """
    module = importlib.import_module(f"stepdistill.{fault.module}")
    text, old = inspect.getsource(module), fault.pattern
    found = len(old.findall(text))
    assert found == fault.count, f"{fault.name}: {fault.module} has {found} of {fault.old!r}, {fault.count} expected"
    changed = ModuleType(module.__name__)
    changed.__dict__.update(__package__=module.__package__, __file__=module.__file__)
    exec(compile(old.sub(lambda _: fault.new, text), module.__file__, "exec"), changed.__dict__)
    after = dict(functions(changed))
    pairs = [(function, after[name]) for name, function in functions(module) if name in after]
    different = [(ours, part, getattr(theirs, part)) for ours, theirs in pairs for part in PARTS
                 if not same(getattr(ours, part), getattr(theirs, part))]
    assert different, f"{fault.name} changes no function"
    for function, part, changed_part in different:
        monkeypatch.setattr(function, part, changed_part)


def shared_out(faults: Sequence[Fault]) -> list[Any]:
    """For a test of each: one in twelve with every push, the others with the long tests."""
    return [fault if i % 12 == 0 else pytest.param(fault, marks=pytest.mark.long) for i, fault in enumerate(faults)]


def functions(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """Those that a module defines, and those of its classes, by their names; without decorators."""
    for name, value in vars(module).items():
        if isinstance(value, type) and value.__module__ == module.__name__:
            for inner, method in vars(value).items():
                if (function := plain(method)) is not None:
                    yield f"{name}.{inner}", function
        elif (function := plain(value)) is not None and function.__module__ == module.__name__:
            yield name, function


def plain(value: Any) -> FunctionType | None:
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, cached_property):
        value = value.func
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def same(one: Any, other: Any) -> bool:
    """Of code, but for the lines that it stands on."""
    if not isinstance(one, CodeType):
        return one == other
    alike = (one.co_code, one.co_names, one.co_varnames) == (other.co_code, other.co_names, other.co_varnames)
    return alike and len(one.co_consts) == len(other.co_consts) and all(
        same(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else (a, type(a)) == (b, type(b))
        for a, b in zip(one.co_consts, other.co_consts))


def checks(method: str) -> Iterator[Check]:
    """The rows of a method under both noises: its paths, on the problem's own schedule, then its closed forms."""
    by_hand = importlib.import_module(f"stepdistill.proofs.paths_{method}")
    forms = importlib.import_module(f"stepdistill.proofs.{method}").closed_forms
    alone = [replace(path, elsewhere=False) for path in by_hand.PATHS]
    for noise in ("vp", "flow"):
        yield from rows(by_hand.ALGORITHM, Problem(SEED, noise), alone)
    for noise in ("vp", "flow"):
        yield from forms(Problem(SEED, noise))


def identities(method: str) -> Iterator[Check]:
    """All rows of a method under both noises."""
    for noise in NAMES:
        yield from importlib.import_module(f"stepdistill.proofs.{method}").identities(Problem(SEED, noise))


def first_red(rows: Iterator[Check]) -> str | None:
    """The first row that fails; or why rows cannot be measured, which is a row that fails, too."""
    try:
        return next((check.name for check in rows if not check.passed), None)
    except (RuntimeError, ValueError) as error:          # such as a graph that is gone, or heads of other features
        return f"{type(error).__name__}: {error}"


def unseen(fault: Fault, monkeypatch) -> list[str]:
    """The methods in whose rows a fault, once planted, goes unnoticed."""
    plant(monkeypatch, fault)
    return [method for method in fault.methods if first_red(checks(method)) is None]


def whole(method: str) -> list[str]:
    """Rows that are red, where nothing is planted."""
    return [f"{check.name}: {check.figure:.3g}" for check in checks(method) if not check.passed]
