"""The stages of a recipe: small tables, each a run of its own that begins with the student of the one before.

    steps: 4                                   entries of all stages, as of any recipe
    stages:
      - {method: guided, steps: 16}            its teacher is the pipeline
      - {steps: [8, 4], teacher: previous}     a stage for each number; its teacher is the student of the stage before

Each table changes entries of the recipe for its stage alone; what was --set holds in all. Nothing here imports torch.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import RequestError
from ..methods import KINDS
from .yaml import EntryPath, Source, leaves

TEACHERS = ("base", "previous")
MOST = 64                                              # stages
# What no stage can change: there is one teacher's pipeline, and one folder of plugins.
FIXED = ("stages", "revision", "teacher", "negative_prompt", "guidance_rescale", "plugins")


def staged(source: Source) -> list[tuple[str, Source]]:
    """(base or previous, the recipe of the stage as a source of its own) for each stage; of a recipe without, itself
    alone.

    RequestError for what is no list of tables, and for teachers that a stage cannot have.
    """
    if "stages" not in source.values:
        return [("base", source)]
    tables = source.values["stages"]
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise RequestError(f"{source.where(('stages',))}: stages is {tables!r}; it should be a list of tables such as "
                           "[{steps: 8}, {steps: 4, teacher: previous}]")
    found: list[tuple[str, Source]] = []
    for i, table in enumerate(tables):
        at = ("stages", i)
        for one in _each(source, at, table):
            found.append((_teacher(source, at, one, not found), _merged(source, at, one)))
            if len(found) > MOST:
                raise RequestError(f"{source.where(at)}: stages are more than {MOST}, a list of steps being one "
                                   "for each: halving 1,024 steps takes 10")
    return found


def _each(source: Source, at: EntryPath, table: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A table whose steps are a list stands for one a number."""
    steps = table.get("steps")
    if steps == []:
        raise RequestError(f"{source.where((*at, 'steps'))}: steps of a stage is an empty list: give a number, or one "
                           "a stage such as [8, 4]")
    return ({**table, "steps": count} for count in steps) if isinstance(steps, list) else iter([table])


def _teacher(source: Source, at: EntryPath, table: Mapping[str, Any], first: bool) -> str:
    teacher = table.get("teacher", TEACHERS[0])
    if teacher not in TEACHERS:
        raise RequestError(f"{source.where((*at, 'teacher'))}: teacher of a stage is {teacher!r}; it should be base, "
                           "the recipe's pipeline, "
                           "or previous, the student of the stage before")
    if first and teacher == "previous":
        raise RequestError(f"{source.where((*at, 'teacher'))}: teacher of the first stage is previous, but no stage is "
                           "before it: "
                           "it should be base")
    return teacher


def _merged(source: Source, at: EntryPath, table: Mapping[str, Any]) -> Source:
    """The entries of all stages with this one's over them. Of another method all settings are the stage's own, and a
    kind of data takes the place of another."""
    own = {path: value for path, value in leaves(table) if path != ("teacher",) and not source.was_set(path)}
    if ("student", "from") in own and at != ("stages", 0):
        raise RequestError(f"{source.where((*at, 'student', 'from'))}: student.from in a stage after the first, which "
                           "begins with the student before: only the first stage may begin with a LoRA")
    if fixed := [path for path in own if path[0] in FIXED]:
        raise RequestError(f"{source.where((*at, *fixed[0]))}: {fixed[0][0]} is no entry of a stage: it is the whole "
                           "recipe's")
    place = lambda path: source.where((*at, *path))
    common = Source(source.name, {key: value for key, value in source.values.items() if key != "stages"},
                    {path: written for path, written in source.places.items() if path[0] != "stages"})
    merged = common.changed(_replaced(common.values, own), place).changed(own.items(), place)
    tables = {path[:length]: place(path[:length]) for path in own for length in range(1, len(path))}
    return Source(source.name, merged.values, merged.places | tables)


def _replaced(common: Mapping[str, Any], own: Mapping[EntryPath, Any]) -> list[tuple[EntryPath, Any]]:
    """What of the recipe does not hold for a stage that says `own`."""
    gone: list[tuple[EntryPath, Any]] = []
    if "method" in common and own.get(("method",), common["method"]) != common["method"]:
        gone.append((("settings",), {}))
    named = {path[1] for path, value in own.items() if path[0] == "data" and len(path) > 1 and value is not None}
    if named & {*KINDS} and isinstance(common.get("data"), dict):
        gone += [(("data", kind), None) for kind in KINDS if kind in common["data"] and kind not in named]
    return gone
