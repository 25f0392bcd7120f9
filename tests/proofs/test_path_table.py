"""The table of paths keeps up with the settings and the recipes."""
from __future__ import annotations

from dataclasses import make_dataclass
from typing import Literal

import pytest

from stepdistill.methods import load_method
from stepdistill.proofs import path_table as paths
from stepdistill.proofs.problem import NAMES, Problem
from stepdistill.recipe import Recipe
from stepdistill.recipe.catalogue import builtin

METHODS = tuple(paths.PATHS)


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_has_a_path(method):
    assert not paths.uncovered(method)


def test_a_new_setting_without_a_path_is_named():
    """A number, a switch and a choice, each of which nothing varies."""
    known = load_method("kd").Settings
    more = [("power", float, 2.0), ("even", bool, False), ("rule", Literal["a", "b"], "a")]
    new = make_dataclass("Settings", more, bases=(known,), frozen=True, kw_only=True,
                         namespace={"__module__": known.__module__})
    assert paths.uncovered("kd", new) == ["power", "even = True", "rule = 'b'"]


def test_every_shipped_stage_is_on_a_path_that_is_served():
    """Each stage of each recipe of these methods, under at least one noise."""
    seen = 0
    for name in builtin():
        stage = Recipe.load(name)
        while stage is not None:
            if stage.method in METHODS:
                chosen = (stage.method_settings(), stage.steps, stage.guidance, stage.taught_by_previous)
                like = [path for path in paths.shipped(stage.method)
                        if (path.settings_of(stage.method), path.steps, path.w, path.previous) == chosen]
                assert like, f"{name}, {stage.method} at {stage.steps} steps"
                assert any(paths.served(stage.method, path, Problem(0, noise)) for path in like for noise in NAMES)
                seen += 1
            stage = stage.previous
    assert seen >= 30
