"""A recipe with every entry that it left to its defaults, as it is written into a run's folder."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import resources
from .yaml import unwrapped

if TYPE_CHECKING:
    from .schema import Recipe


def resolved(recipe: Recipe) -> dict[str, Any]:
    """In plain types; paths hold from anywhere. In stages, the last one's entries, and what each changes in them."""
    plain = _of_stage(recipe)
    if recipe.previous is None:
        return plain
    return plain | {"stages": [{"teacher": "previous" if stage.taught_by_previous else "base"}
                               | _changes(plain, _of_stage(stage))
                               for stage in recipe.stages]}


def _of_stage(recipe: Recipe) -> dict[str, Any]:
    plain = unwrapped(recipe.model_dump()) | {"settings": unwrapped(dataclasses.asdict(recipe.method_settings()))}
    for role in ("student", "critic"):
        if plain[role] in ({"lora": None, "begins_with": None}, {"lora": None, "lr": None}):
            plain[role] = "full"
    if recipe.trains_solver:
        plain["student"] = "solver"
    plain["teacher"] = recipe.teacher.plain
    if recipe.plugins is not None:
        plain["plugins"] = {"folder": resources.portable(recipe.plugins.folder), "sha256": recipe.plugged.sha256}
    if recipe.student.begins_with is not None:
        given = unwrapped(recipe.student.lora.model_dump(exclude_unset=True))        # the rest is the LoRA's own
        plain["student"] = {"from": resources.portable(recipe.student.begins_with), "lora": given}
    elif isinstance(plain["student"], dict):
        del plain["student"]["begins_with"]
    paths = [(plain["data"], "images"), (plain["data"], "prompts"), (plain["evaluate"], "reference"),
             (plain["evaluate"], "features")]
    paths += [] if plain["discriminator"] is None else [(plain["discriminator"], "network")]
    paths += [(table, name) for table in (plain["data"]["samples"], plain["data"]["pairs"], plain["negatives"])
              if table is not None
              for name in ("prompts", "path") if name in table]
    if recipe.reward is not None and "=" in recipe.reward:
        name, _, place = recipe.reward.partition("=")
        plain["reward"] = f"{name}={resources.portable(place)}"
    for table, name in paths:
        if isinstance(table[name], str) and table[name] not in ("shapes", "inception"):
            table[name] = resources.portable(table[name])
    return plain


def _changes(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What makes `own` of `common`, a table's entries one by one; all settings where they are another method's."""
    changed = {key: _changes(common[key], value) if isinstance(value, dict) and isinstance(common[key], dict) else value
               for key, value in own.items() if key not in common or value != common[key]}
    return changed | ({"settings": own["settings"]} if "method" in changed else {})
