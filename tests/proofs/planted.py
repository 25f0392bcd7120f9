"""Faults planted in the source: a line of a module is changed, and all who have imported it run the changed."""
from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from stepdistill.proofs.problem import NAMES, Problem

SEED = 5


@dataclass(frozen=True)
class Fault:
    """In `module` of the package, `old`, which stands there once, becomes `new`. method: whose rows are to turn red."""

    method: str
    module: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.method}: {self.old.strip()[:60]} -> {self.new.strip()[:60] or 'nothing'}"

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """AssertionError where the line is not there, or where nothing that runs has changed."""
        module = importlib.import_module(f"stepdistill.{self.module}")
        source = Path(module.__file__).read_text(encoding="utf-8")
        assert source.count(self.old) == 1, f"{self.module} has {source.count(self.old)} of: {self.old}"
        changed = ModuleType(module.__name__)
        vars(changed).update({"__package__": module.__package__, "__file__": module.__file__})
        exec(compile(source.replace(self.old, self.new), module.__file__, "exec"), vars(changed))
        swaps = [(ours, theirs, part) for ours, theirs in _pairs(module, changed)
                 for part in ("__code__", "__kwdefaults__", "__defaults__")
                 if getattr(ours, part) != getattr(theirs, part)]
        assert swaps, f"nothing that runs has changed with: {self.new}"
        for ours, theirs, part in swaps:
            monkeypatch.setattr(ours, part, getattr(theirs, part))


def _pairs(module: ModuleType, changed: ModuleType) -> Iterator[tuple[FunctionType, FunctionType]]:
    """The functions and methods that a module defines, and those of its changed double."""
    for name, ours in vars(module).items():
        theirs = vars(changed).get(name)
        if getattr(ours, "__module__", None) != module.__name__:
            continue
        if isinstance(ours, FunctionType):
            yield inspect.unwrap(ours), inspect.unwrap(theirs)
        elif isinstance(ours, type):
            for attribute, own in vars(ours).items():
                own, other = (_function(each) for each in (own, vars(theirs).get(attribute)))
                if own is not None and other is not None:
                    yield own, other


def _function(value: Any) -> FunctionType | None:
    if isinstance(value, classmethod | staticmethod | property):
        value = value.fget if isinstance(value, property) else value.__func__
    return inspect.unwrap(value) if isinstance(value, FunctionType) else None


def first_red(method: str, seed: int = SEED) -> str | None:
    """The first identity row of a method that fails, under one noise after the other; None where all pass."""
    identities = importlib.import_module(f"stepdistill.proofs.{method}").identities
    for noise in NAMES:
        try:
            for check in identities(Problem(seed, noise)):
                if not check.passed:
                    return f"{check.name} ({noise}): {check.figure:.3g} > {check.tolerance:g}"
        except (ValueError, RuntimeError) as error:     # such as a scale told to a network that reads none
            return f"{type(error).__name__}: {error}"
    return None
