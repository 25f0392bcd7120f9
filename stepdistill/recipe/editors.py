"""The schema of a recipe for editors: JSON Schema, with each entry's meaning as it stands beside it
in the source."""
from __future__ import annotations

import ast
import inspect
from itertools import takewhile
from typing import Any

from ..methods import METHODS
from . import entries as tables
from .schema import Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """A recipe is valid under it, or Recipe.load refuses it. What entries must be together it does not say."""
    found = Recipe.model_json_schema()
    own = {"Recipe": found, **found["$defs"]}
    for name, table in own.items():
        said = meanings(Recipe if name == "Recipe" else vars(tables)[name])
        for entry, kind in table["properties"].items():
            kind.pop("title", None)
            if said.get(entry):
                kind["description"] = said[entry]
    entries = found["properties"]
    entries["method"] = {"description": entries["method"]["description"],
                         "anyOf": [{"enum": [*METHODS]}, {"type": "string"}]}
    entries["revision"] = {"type": ["string", "null"], "deprecated": True, "description": "teacher.revision, as "
                           "earlier versions wrote it"}
    entries["stages"] = {"description": "small tables, each of which changes entries for its stage", "type": "array",
                         "minItems": 1,
                         "items": _stage(entries)}
    return {"$schema": DRAFT, **found, "title": "A recipe of stepdistill", "description": "The choices of one "
            "distillation."}


def meanings(model: type) -> dict[str, str]:
    """Entry -> the comment beside it in a table's source, which may go on below."""
    lines, _ = inspect.getsourcelines(model)
    tree = ast.parse(inspect.cleandoc("\n" + "".join(lines)))
    nodes = [node for node in tree.body[0].body if isinstance(node, ast.AnnAssign)
             and not node.target.id.startswith("_")]
    fields = model.model_fields
    return {fields[node.target.id].alias or node.target.id: _comment(lines[node.end_lineno - 1:]) for node in nodes}


def _comment(lines: list[str]) -> str:
    """Beside the first line, and on those after it that are comments alone and further in than an entry."""
    below = takewhile(lambda line: line.startswith(" " * 8) and line.lstrip().startswith("#"), lines[1:])
    parts = (lines[0].partition("  #")[2], *(line.lstrip()[1:] for line in below))
    return " ".join(part.strip() for part in parts if part.strip())


def _stage(entries: dict[str, Any]) -> dict[str, Any]:
    """Of a stage's table: entries of the recipe, which lie in it by dotted name too; a number of steps for each of
    several stages."""
    steps = {"anyOf": [entries["steps"], {"type": "array", "minItems": 1, "items": entries["steps"]}]}
    free = {name: {} for name in entries if name not in ("teacher", "steps", "stages", "revision", "negative_prompt",
                                                         "guidance_rescale", "plugins")}
    return {"type": "object", "properties": {**free, "teacher": {"enum": ["base", "previous"]}, "steps": steps}}
