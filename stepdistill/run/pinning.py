"""The commits of what a teacher has from the Hub: a run notes them, and goes on with them."""
from __future__ import annotations

from typing import Any

from .. import resources
from ..models.sources import LORA_FILE, FusedLora, Source, at_revision, cached_file, configs_of
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
        if (noted := vars(was)[name]) and (place := vars(now)[name]) and noted != place:
            entries[name] = noted if noted.startswith(f"{place}@") else _committed(place, file)
    if len(now.loras) == len(was.loras):
        entries["loras"] = [lora.model_dump() | {"path": lora.path if lora.path == noted.path else
                                                 noted.path if noted.path.startswith(f"{lora.path}@")
                                                 else _lora_committed(lora.path)}
                            for lora, noted in zip(now.loras, was.loras, strict=True)]
    return _with(recipe, entries)


def _with(recipe: Recipe, entries: dict[str, Any]) -> Recipe:
    """The recipe with those entries of its teacher that differ."""
    given = recipe.teacher.model_dump()
    changed = {f"teacher.{name}": value for name, value in entries.items() if value != given[name]}
    return Recipe.load(recipe.resolved(), changed) if changed else recipe


def _commit_of_base(teacher: Teacher) -> str | None:
    place = configs_of(Source(teacher.base, config=teacher.config))
    if resources.locate(place) is not None:
        return teacher.revision
    index = cached_file(place, "model_index.json", teacher.revision)
    return teacher.revision if index is None else index.parent.name


def _committed(place: str, file: str) -> str:
    """A Hub id with the commit of which the cache holds `file`; whatever else it is, as it is."""
    if resources.locate(place) is not None:
        return place
    name, revision = at_revision(place)
    found = cached_file(name, file, revision)
    return place if found is None else f"{name}@{found.parent.name}"


def _lora_committed(path: str) -> str:
    if resources.locate(path) is not None:
        return path
    place, file, revision = FusedLora(path).find()
    found = cached_file(place, file or LORA_FILE, revision)
    return path if found is None else f"{path.partition('@')[0]}@{found.parent.name}"
