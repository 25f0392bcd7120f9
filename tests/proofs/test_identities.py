"""Every method does what its paper proves, on problems that nobody chose."""
from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from stepdistill import proofs
from stepdistill.methods import METHODS
from stepdistill.proofs.problem import NAMES, Problem

QUICK = "flow"                     # its rows take a third of the others' time
PROVED = [name for name in METHODS if (Path(proofs.__file__).parent / f"{name}.py").is_file()]


@pytest.mark.parametrize("noise", [pytest.param(name, marks=() if name == QUICK else pytest.mark.long)
                                   for name in NAMES])
@pytest.mark.parametrize("method", PROVED)
def test_identities(method, noise):
    checks = list(importlib.import_module(f"stepdistill.proofs.{method}").identities(Problem(0, noise)))
    failed = [f"{c.name}: {c.figure:.3g} > {c.tolerance:g}" for c in checks if not c.passed]
    assert checks and not failed, failed
