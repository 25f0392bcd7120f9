"""The schema for editors: every recipe that ships is valid under it, and what a recipe refuses mostly is not."""
from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from stepdistill.methods import METHODS
from stepdistill.recipe import Recipe, editors
from stepdistill.recipe.catalogue import builtin
from stepdistill.recipe.yaml import Source

SCHEMA = editors.schema()
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
         "null": type(None)}
SAYS_NOTHING = {"title", "description", "default", "deprecated", "$schema", "$defs"}


def is_of(value: Any, kind: str) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def faults(value: Any, schema: dict[str, Any], path: str = "recipe") -> list[str]:
    """By the words of JSON Schema that the schema uses; another word is a KeyError."""
    found: list[str] = []
    for word, says in schema.items():
        if word in SAYS_NOTHING:
            continue
        holds = {
            "$ref": lambda: not found.extend(faults(value, SCHEMA["$defs"][says.rsplit("/", 1)[1]], path)),
            "anyOf": lambda: any(not faults(value, one, path) for one in says),
            "type": lambda: any(is_of(value, kind) for kind in (says if isinstance(says, list) else [says])),
            "enum": lambda: value in says, "const": lambda: value == says,
            "required": lambda: not isinstance(value, dict) or {*says} <= value.keys(),
            "additionalProperties": lambda: says is not False or not isinstance(value, dict)
            or value.keys() <= schema["properties"].keys(),
            "properties": lambda: not isinstance(value, dict) or not found.extend(
                fault for name, one in says.items() if name in value
                for fault in faults(value[name], one, f"{path}.{name}")),
            "items": lambda: not isinstance(value, list) or not found.extend(
                fault for i, one in enumerate(value) for fault in faults(one, says, f"{path}[{i}]")),
            "minimum": lambda: not is_of(value, "number") or value >= says,
            "exclusiveMinimum": lambda: not is_of(value, "number") or value > says,
            "maximum": lambda: not is_of(value, "number") or value <= says,
            "exclusiveMaximum": lambda: not is_of(value, "number") or value < says,
            "minItems": lambda: not isinstance(value, list) or len(value) >= says,
            "maxItems": lambda: not isinstance(value, list) or len(value) <= says,
        }[word]()
        found += [] if holds else [f"{path}: {word} {says!r:.80}"]
    return found


@pytest.mark.parametrize("name", builtin())
def test_each_recipe_that_ships_is_valid(name):
    assert faults(Source.of_file(builtin()[name]).values, SCHEMA) == []


def test_a_resolved_recipe_is_valid():
    for name in ("shapes/dmd2", "toy/kd"):
        assert faults(Recipe.load(name).resolved(), SCHEMA) == []


WHOLE = {"method": "lcm", "teacher": "assets/shapes-sd", "data": {"images": "shapes", "batch": 4},
         "train": {"updates": 2}}


@pytest.mark.parametrize("entries", [
    {"student": "full"}, {"student": {"from": "a.safetensors"}}, {"guidance": [2, 5]}, {"resolution": [832, 1216]},
    {"resolution": "buckets"}, {"resolution": {"buckets": [[1024, 1024], [832, 1216]]}},
    {"plugins": "mine"},
    {"teacher": {"base": "a/b", "loras": ["x", {"path": "y", "weight": 0.5}]}}, {"method": "a_method_of_mine"},
    {"stages": [{"steps": [8, 4], "teacher": "previous"}]}, {"critic": {"lora": None, "lr": 1e-5}}])
def test_what_a_recipe_may_say_is_valid(entries):
    assert faults(WHOLE | entries, SCHEMA) == []


@pytest.mark.parametrize("entries", [
    {"stpes": 2}, {"steps": 0}, {"steps": "4"}, {"student": "half"}, {"guidance": "3"}, {"guidance": [1, 2, 3]},
    {"resolution": [1]}, {"resolution": "bucket"}, {"resolution": {"buckets": [[1024, 1024]]}},
    {"resolution": {"bucket": []}},
    {"train": {"updates": 2, "precision": "fp8"}}, {"train": {"lr": 1e-3}},
    {"train": {"updates": 2, "trackers": ["comet"]}}, {"stages": []},
    {"data": {"images": "shapes", "batch": 4, "caption_dropout": 1.0}}, {"stages": [{"teacher": "other"}]},
    {"plugins": {"sha256": "x"}}])
def test_what_a_recipe_refuses_is_not(entries):
    assert faults(WHOLE | entries, SCHEMA)


def test_entries_have_their_meanings_and_methods_their_names():
    properties = SCHEMA["properties"]
    assert (properties["method"]["anyOf"][0]["enum"] == [*METHODS] and properties["steps"]["description"]
            == "network evaluations of the student")
    described = [entry for table in ({"properties": properties}, *SCHEMA["$defs"].values())
                 for entry in table["properties"].values()]
    assert len([entry for entry in described if entry.get("description")]) > 0.9 * len(described)


def test_the_command_prints_it(stepdistill):
    done = stepdistill("recipes", "--schema")
    assert done.returncode == 0 and json.loads(done.stdout) == json.loads(json.dumps(copy.deepcopy(SCHEMA))), (
        done.stderr)
