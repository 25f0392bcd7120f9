"""Entries by the names that they had in version 0.1."""
from __future__ import annotations

from typing import Any

import pytest
from ruamel.yaml import YAML

from stepdistill.errors import RequestError
from stepdistill.recipe import Recipe
from stepdistill.recipe.messages import EARLIER_NAMES

# Earlier path -> a recipe that has such an entry, and a value that is not its default.
GIVEN: dict[tuple[str, ...], tuple[str, Any]] = {
    ("settings", "told"): ("toy/lcm", True),
    ("settings", "tell_exit"): ("toy/sid-1step", True),
    ("settings", "judged_at"): ("shapes/lightning", [0.3]),
    ("settings", "critic_trained_at"): ("toy/sid", 1.5),
    ("settings", "critic_asked_at"): ("toy/sid", 2.5),
    ("settings", "warm"): ("toy/ladd", 7),
    ("settings", "first_shares"): ("toy/ladd", [1.0]),
}


def plain(name: str, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A recipe as a mapping, with one entry given under the earlier name alone."""
    recipe = Recipe.load(name).resolved()
    table = recipe
    for key in path[:-1]:
        table = table[key]
    del table[EARLIER_NAMES[path]]
    table[path[-1]] = value
    return recipe


def settled(recipe: Recipe, name: str) -> Any:
    value = vars(recipe.method_settings())[name]
    return list(value) if isinstance(value, tuple) else value


def test_every_earlier_name_is_tried():
    assert GIVEN.keys() == EARLIER_NAMES.keys()


@pytest.mark.parametrize("path", GIVEN, ids=".".join)
def test_an_entry_loads_by_its_earlier_name(path, tmp_path):
    (name, value), new = GIVEN[path], EARLIER_NAMES[path]
    recipe = Recipe.load(plain(name, path, value))
    assert settled(recipe, new) == value and recipe.settings[new] == value and path[-1] not in recipe.settings
    assert recipe.resolved()["settings"][new] == value

    file = tmp_path / "mine.yaml"
    with open(file, "w") as text:
        YAML().dump(plain(name, path, value), text)
    assert Recipe.load(file).resolved() == recipe.resolved()

    known = Recipe.load(name).resolved()
    without = known | {"settings": {key: inner for key, inner in known["settings"].items() if key != new}}
    assert Recipe.load(without, {".".join(path): value}).resolved() == recipe.resolved()


@pytest.mark.parametrize("path", GIVEN, ids=".".join)
def test_both_names_are_refused(path):
    (name, value), new = GIVEN[path], EARLIER_NAMES[path]
    with_both = Recipe.load(name).resolved()
    with_both["settings"][path[-1]] = value
    with pytest.raises(RequestError, match=f"{path[-1]} is the earlier name of {new}, which is given too"):
        Recipe.load(with_both)
    assert settled(Recipe.load(name, {".".join(path): value}), new) == value          # --set puts it over the recipe's


def test_a_stage_has_the_earlier_names_too():
    told = {"settings": {"told": True}}
    stages = [told | {"method": "guided", "steps": 8},
              told | {"method": "progressive", "steps": 4, "teacher": "previous"}]
    recipe = Recipe.load(Recipe.load("toy/lcm").resolved() | {"settings": {}, "guidance": [1.0, 3.0], "stages": stages})
    assert [stage.method_settings().guidance_embedding for stage in recipe.stages] == [True, True]
