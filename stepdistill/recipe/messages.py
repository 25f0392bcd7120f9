"""What pydantic finds wrong with a recipe, in the words of a recipe; and the names that entries had in earlier
versions."""
from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .yaml import EntryPath, Source

# Entries as earlier versions named them -> their names now. Recipes and run folders of those versions go on.
EARLIER_NAMES: dict[EntryPath, str] = {
    ("settings", "told"): "guidance_embedding", ("settings", "tell_exit"): "exit_embedding",
    ("settings", "judged_at"): "discriminator_times", ("settings", "critic_trained_at"): "critic_training_guidance",
    ("settings", "critic_asked_at"): "critic_guidance", ("settings", "warm"): "warmup_updates",
    ("settings", "first_shares"): "warmup_shares",
}
# Entries that stood elsewhere -> their places now.
EARLIER_PLACES: dict[EntryPath, EntryPath] = {("revision",): ("teacher", "revision")}

_EXPECTED = {
    "int_type": "should be a whole number", "float_type": "should be a number", "string_type": "should be a text",
    "bool_type": "should be true or false", "list_type": "should be a list such as [1, 2, 4]",
    "dict_type": "should be a table",
    "model_type": "should be a table of entries", "int_from_float": "should be a whole number",
    "greater_than_equal": "should be at least {ge}", "greater_than": "should be above {gt}",
    "less_than": "should be below {lt}",
    "less_than_equal": "should be at most {le}", "literal_error": "should be {expected}",
    "too_short": "should not be empty",
    "int_parsing": "should be a whole number", "float_parsing": "should be a number", "value_error": "{error}",
    "finite_number": "should be a finite number",
}


def current(source: Source, overrides: Mapping[str, Any]) -> Source:
    """The recipe with the names and places of today, and with these entries put over its own. RequestError where an
    entry stands in it under both."""
    whole = source.renamed(EARLIER_NAMES).overridden(overrides, EARLIER_NAMES)
    return whole.moved(EARLIER_PLACES)


def complaint(source: Source, path: EntryPath, error: Mapping[str, Any],
              entries: Callable[[EntryPath], list[str]]) -> str:
    """One line on one error. entries: those that the table at a path can have."""
    if path == ("settings",) and error["type"] == "value_error":
        return _of_settings(source, str(error["ctx"]["error"]))
    dotted = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        says = unknown(str(path[-1]), entries(path[:-1]), "entry of " + (".".join(map(str, path[:-1])) or "a recipe"))
    elif error["type"] == "missing":
        says = "is missing"
    else:
        says = f"is {error['input']!r}; it {_expected(error)}"
    return f"{source.where(path)}: {dotted} {says}"


def _of_settings(source: Source, message: str) -> str:
    """What a method says of its settings together, at the place of one that it names: of one that was --set, if there
    is such."""
    named = [("settings", word) for word in re.findall(r"\w+", message) if ("settings", word) in source.places]
    place = next((path for path in named if source.was_set(path)), (*named, ("settings",))[0])
    return f"{source.where(place)}: settings: {message}"


def _expected(error: Mapping[str, Any]) -> str:
    if error["type"] in _EXPECTED:
        return _EXPECTED[error["type"]].format(**error.get("ctx", {}))
    return f"is refused: {error['msg']}"


def unknown(name: str, valid: Iterable[str], what: str) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"is no {what}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(valid)}")
