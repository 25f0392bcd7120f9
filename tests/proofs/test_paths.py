"""Every setting of the distribution and adversarial methods has a row, and every recipe's path."""
from __future__ import annotations

import importlib
from dataclasses import fields, make_dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from stepdistill.methods import METHODS
from stepdistill.proofs.paths import Path, apart
from stepdistill.proofs.problem import Problem, largest
from stepdistill.recipe import Recipe
from stepdistill.recipe.catalogue import builtin

PROVED = [name for name, entry in METHODS.items() if entry.family in ("distribution", "adversarial", "hybrid")]
UNIT_PROOFS: dict[str, tuple[str, ...]] = {}             # settings that a unit test proves in place of a row, by method


def by_hand(method: str):
    return importlib.import_module(f"stepdistill.proofs.paths_{method}")


def unproved(settings: type, paths: tuple[Path, ...]) -> list[str]:
    """Settings that no path changes from their default, and choices that none takes."""
    default, hints, missing = settings(), get_type_hints(settings), []
    for f in fields(settings):
        taken = [getattr(default, f.name), *(path.settings[f.name] for path in paths if f.name in path.settings)]
        if get_origin(hints[f.name]) is Literal:
            missing += [f"{f.name}: {choice}" for choice in get_args(hints[f.name]) if choice not in taken]
        elif all(value == taken[0] for value in taken):
            missing.append(f.name)
    return missing


@pytest.mark.parametrize("method", PROVED)
def test_every_setting_has_a_row(method):
    found = by_hand(method)
    missing = [name for name in unproved(found.ALGORITHM.method.Settings, found.PATHS)
               if name not in UNIT_PROOFS.get(method, ())]
    assert not missing, f"no path of proofs/paths_{method}.py changes {', '.join(missing)}: add one"


def test_a_new_setting_is_missed():
    settings = make_dataclass("Settings", [("weight", float, 1.0), ("law", Literal["one", "two"], "one")], frozen=True)
    assert unproved(settings, ()) == ["weight", "law: two"]
    assert unproved(settings, (Path("a", {"weight": 2.0}), Path("b", {"law": "two"}))) == []


@pytest.mark.parametrize("method", PROVED)
def test_the_defaults_have_a_row_on_every_schedule(method):
    assert any(not path.settings and path.guidance is None and path.elsewhere for path in by_hand(method).PATHS)


@pytest.mark.parametrize("method", PROVED)
def test_guidance_of_every_form_has_a_row(method):
    if method == "ladd":                                 # the data carry its guidance
        return
    scales = [path.guidance for path in by_hand(method).PATHS]
    forms = {"none" if w == 1 else "range" if isinstance(w, tuple) else "scale" for w in scales}
    assert forms == {"none", "range", "scale"}


def shipped() -> list[tuple[str, str, object, int, float | tuple[float, float]]]:
    """(recipe, method, settings, steps, guidance) of each stage of each shipped recipe of these methods."""
    stages = [(name, stage) for name in builtin() for stage in Recipe.load(name).stages]
    return [(name, stage.method, stage.method_settings(), stage.steps, stage.guidance)
            for name, stage in stages if stage.method in PROVED]


def near(ours: object, theirs: object) -> bool:
    """Equal, but for a start time: a row has one that float32 holds, at most one timestep of 1,000 away."""
    ours_at, theirs_at = (getattr(settings, "start_time", None) for settings in (ours, theirs))
    if ours_at is None or theirs_at is None:
        return ours == theirs
    return abs(ours_at - theirs_at) <= 1.001e-3 and replace(ours, start_time=theirs_at) == theirs


def test_every_shipped_recipe_has_a_row():
    missing = []
    for name, method, settings, steps, guidance in shipped():
        found = by_hand(method)
        kind = found.ALGORITHM.method.Settings
        paths = [path for path in found.PATHS if near(kind(**path.settings), settings) and path.steps == steps]
        if method != "ladd":
            paths = [path for path in paths if (path.guidance == 1.0) == (guidance == 1.0)]
        if not any(path.elsewhere for path in paths):
            missing.append(f"{name}: {method} at {steps} steps, {settings}, guidance {guidance}")
    assert not missing, "\n".join(missing)


class Deaf:
    """A method that keeps the default of one setting, whatever it is set to."""

    def __init__(self, method: type, setting: str) -> None:
        self.method, self.setting, self.Settings = method, setting, method.Settings
        self.needs = method.needs

    def deaf(self, settings):
        return replace(settings, **{self.setting: getattr(self.Settings(), self.setting)})

    def inference(self, settings, *rest):
        return self.method.inference(self.deaf(settings), *rest)

    def __call__(self, settings, *rest):
        return self.method(self.deaf(settings), *rest)


@pytest.mark.parametrize("method", PROVED)
def test_a_setting_that_is_passed_over_turns_a_row_red(method):
    found = by_hand(method)
    for f in fields(found.ALGORITHM.method.Settings):
        deaf = replace(found.ALGORITHM, method=Deaf(found.ALGORITHM.method, f.name))
        changed = [path for path in found.PATHS if f.name in path.settings]
        figures = (passed_over(deaf, path) for path in changed)
        assert any(not figure <= 1e-7 for figure in figures), f"{method} could pass over {f.name}"


def passed_over(algorithm, path: Path) -> float:
    try:
        return largest(*(apart(algorithm, Problem(5, "vp"), path, index) for index in path.moments))
    except (ValueError, KeyError, RuntimeError):         # a default that cannot stand beside the others: no proof
        return 0.0
