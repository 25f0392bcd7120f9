"""One name finds a method's file, its recipe, its test and its row in the table."""
from __future__ import annotations

from pathlib import Path

import pytest

from stepdistill.methods import METHODS
from stepdistill.recipe.catalogue import builtin, method_of
from stepdistill.recipe.yaml import Source

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in (ROOT / "stepdistill/methods").glob("*/*.py") if path.stem != "__init__"}


@pytest.mark.parametrize("name", sorted({*METHODS, *FILES}))
def test_stem_law(name):
    assert name in METHODS, f"{FILES[name]} has no row in stepdistill/methods/__init__.py"
    entry = METHODS[name]
    assert FILES[name] == ROOT / "stepdistill/methods" / f"{entry.module.replace('.', '/')}.py"
    assert FILES[name].parent.name == entry.family == entry.module.split(".")[0] and entry.module.split(".")[1] == name
    assert list((ROOT / "recipes").glob(f"*/{name}*.yaml")), f"no recipe recipes/*/{name}*.yaml"
    assert (ROOT / "tests/methods" / f"test_{name}.py").is_file(), f"no test tests/methods/test_{name}.py"


def test_every_recipe_is_of_a_method_with_its_name():
    for name, path in builtin().items():
        method = Source.of_file(path).values["method"]
        assert method_of(path) == method, f"{name} is a recipe of {method}"
