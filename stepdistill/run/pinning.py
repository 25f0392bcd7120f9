"""The commits of what a teacher has from the Hub: a run notes them, and goes on with them."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import resources
from ..models.sources import LORA_FILE, FusedLora, Source, at_revision, commit_of, configs_of
from ..recipe import Recipe
from ..recipe.entries import Teacher

PARTS = {"vae": "config.json", "scheduler": "scheduler_config.json"}
"""What a teacher may have from elsewhere -> a file of it."""


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with the commits that the Hub's cache holds, of a teacher that was loaded a moment ago."""
    teacher = recipe.teacher
    entries: dict[str, Any] = {"revision": _commit_of_base(teacher)}
    entries |= {name: _committed(place, file) for name, file in PARTS.items() if (place := vars(teacher)[name])}
    entries["loras"] = [lora.model_dump() | {"path": _lora_committed(lora.path)} for lora in teacher.loras]
    return _with(recipe, entries)


def as_begun(recipe: Recipe, begun: Recipe) -> Recipe:
    """A recipe that is to go on, with the commits that its run was begun with: where it names no revision the run's,
    and of a branch or tag the commit that the cache holds."""
    was, now = begun.teacher, recipe.teacher
    entries: dict[str, Any] = {}
    if now.base == was.base and now.revision != was.revision:
        entries["revision"] = was.revision if now.revision is None else _commit_of_base(now)
    for name, file in PARTS.items():
        if (noted := vars(was)[name]) and (place := vars(now)[name]):
            entries[name] = _as_noted(noted, place, lambda place, file=file: _committed(place, file))
    if len(now.loras) == len(was.loras):
        entries["loras"] = [lora.model_dump() | {"path": _as_noted(noted.path, lora.path, _lora_committed)}
                            for lora, noted in zip(now.loras, was.loras, strict=True)]
    return _with(recipe, entries)


def _with(recipe: Recipe, entries: dict[str, Any]) -> Recipe:
    """The recipe with those entries of its teacher that differ."""
    given = recipe.teacher.model_dump()
    changed = {f"teacher.{name}": value for name, value in entries.items() if value != given[name]}
    return Recipe.load(recipe.resolved(), changed) if changed else recipe


def _as_noted(noted: str, place: str, committed: Callable[[str], str]) -> str:
    """The place that is asked for as its run noted it, where that is the same; else with the commit that is at hand."""
    return noted if noted == place or noted.startswith(f"{place}@") else committed(place)


def _commit_of_base(teacher: Teacher) -> str | None:
    place = configs_of(Source(teacher.base, config=teacher.config))
    if resources.locate(place) is not None:
        return teacher.revision
    return commit_of(place, "model_index.json", teacher.revision) or teacher.revision


def _committed(place: str, file: str) -> str:
    """A Hub id with the commit of which the cache holds `file`; whatever else it is, as it is."""
    if resources.locate(place) is not None:
        return place
    name, revision = at_revision(place)
    return _at(place, commit_of(name, file, revision))


def _lora_committed(path: str) -> str:
    if resources.locate(path) is not None:
        return path
    place, file, revision = FusedLora(path).find()
    return _at(path, commit_of(place, file or LORA_FILE, revision))


def _at(place: str, commit: str | None) -> str:
    return place if commit is None else f"{place.partition('@')[0]}@{commit}"
