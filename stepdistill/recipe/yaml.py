"""Where a recipe's values come from: YAML that knows its lines, mappings, and what was --set."""
from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ..errors import RequestError

EntryPath = tuple[str | int, ...]          # an entry's place in the recipe: ("train", "lr")
SET = "--set "
# of a recipe at most: characters, marks of YAML, brackets within each other, <<
LENGTH, MARKS, DEPTH, MERGES = 131_072, 5_000, 64, 100
# of those for what is given: the resolved recipe, with all defaults, is read again
ROOM = 0.9
_MARKS, _BRACKETS, _MERGE = re.compile(r"[,:\[\]{}?&*!|>-]"), re.compile(r"[\[\]{}]"), re.compile(r"<<\s*:")
# tables that may be written as a text -> the entry that the text is
SHORT: dict[EntryPath, str] = {("teacher",): "base", ("plugins",): "folder"}


@dataclass(frozen=True)
class Source:
    """Plain values, and where each was written ("file:line", "--set")."""

    name: str
    values: dict[str, Any]
    places: dict[EntryPath, str]

    @classmethod
    def of_file(cls, path: Path) -> Source:
        try:
            tree = read(_text(path))
            lines, values = _lines(tree) if isinstance(tree, CommentedMap) else {}, unwrapped(tree)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise RequestError(f"{path}:{mark.line + 1 if mark else 1}: no valid YAML: {error.problem}") from None
        except (YAMLError, ValueError) as error:
            raise RequestError(f"{path}: no valid YAML: {error}") from None
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
        if not isinstance(tree, CommentedMap):
            raise RequestError(f"{path}:1: a recipe is a table such as 'method: lcm'; found {_kind(tree)}")
        return cls(str(path), values, {key: f"{path}:{line + 1}" for key, line in lines.items()})

    @classmethod
    def of_mapping(cls, values: Mapping[str, Any]) -> Source:
        return cls("recipe", unwrapped(values), {})

    def overridden(self, overrides: Mapping[str, Any], names: Mapping[EntryPath, str]) -> Source:
        """Each entry of `overrides` ("train.lr": 1e-3, or "train": {"lr": 1e-3}) put over the file's. names: as of
        `renamed`."""
        entries = [(_renamed(path, names), value) for path, value in leaves(overrides)]
        return self.changed(entries, lambda path: f"{SET}{'.'.join(path)}")

    def changed(self, entries: Iterable[tuple[EntryPath, Any]], place: Callable[[EntryPath], str]) -> Source:
        """Each of `entries`, path and value, put over what is there; place(path): where it was written."""
        values, places = unwrapped(self.values), dict(self.places)
        for path, value in entries:
            node = values
            for depth, key in enumerate(path[:-1], start=1):
                node[key] = node = _table(path[:depth], node.get(key))
            node[path[-1]] = value
            places = {key: written for key, written in places.items() if key[:len(path)] != path}
            places[path] = place(path)
        return Source(self.name, values, places)

    def renamed(self, names: Mapping[EntryPath, str]) -> Source:
        """With entries renamed, in the recipe and in its stages: path -> the new last part of it.

        RequestError where an entry stands under both names.
        """
        places: dict[EntryPath, str] = {}
        for path, place in self.places.items():
            places[_renamed(path, names)] = place
        return Source(self.name, self._renamed(self.values, (), names), places)

    def _renamed(self, value: Any, path: EntryPath, names: Mapping[EntryPath, str]) -> Any:
        if isinstance(value, list):
            return [self._renamed(inner, (*path, i), names) for i, inner in enumerate(value)]
        if not isinstance(value, dict):
            return value
        found: dict[str, Any] = {}
        for key, inner in value.items():
            new = str(_renamed((*path, key), names)[-1])
            if new != key and new in value:
                raise RequestError(f"{self.where((*path, key))}: {key} is the earlier name of {new}, which is given "
                                   "too: leave one of them out")
            found[new] = self._renamed(inner, (*path, key), names)
        return found

    def moved(self, entries: Mapping[EntryPath, EntryPath]) -> Source:
        """With entries of the recipe's own top put where they belong today: {old: new}.

        RequestError where an entry stands at both places.
        """
        found = self
        for old, new in ((old, new) for old, new in entries.items() if old[0] in self.values):
            value, place = found.values[old[0]], found.where(old)
            table = found.values.get(new[0])
            if value is not None and isinstance(table, dict) and table.get(new[1]) not in (None, value):
                raise RequestError(f"{place}: {old[0]} is {value!r}, and {'.'.join(new)}, where it belongs now, "
                                   f"is {table[new[1]]!r}: leave one of them out")
            rest = Source(found.name, {key: inner for key, inner in found.values.items() if key != old[0]},
                          {path: said for path, said in found.places.items() if path != old})
            found = rest if value is None else rest.changed([(new, value)], {new: place}.__getitem__)
        return found

    def bounded(self) -> Source:
        """Itself. RequestError for whole numbers that nothing can count to, and for more than could be read again."""
        for path, value in entries(self.values):
            if isinstance(value, int) and abs(value) >= 2**63:
                found = (f"{str(value)[:20]}..., a number of {len(str(abs(value)))} digits"
                         if value.bit_length() < 10_000 else "a number of thousands of digits")
                raise RequestError(f"{self.where(path)}: {'.'.join(map(str, path))} is {found}; it should be "
                                   f"below {2**63}")
        text = json.dumps(self.values, ensure_ascii=False, default=str)
        if (marks := len(_MARKS.findall(text))) > ROOM * MARKS or len(text) > ROOM * LENGTH:
            raise RequestError(f"{self.name}: the recipe has {len(text):,} characters with {marks:,} commas, dashes, "
                               f"colons and the like, and at most {ROOM * LENGTH:,.0f} with {ROOM * MARKS:,.0f} "
                               "can be: put long lists of prompts into a .txt file, one a line")
        return self

    def was_set(self, path: EntryPath) -> bool:
        """Whether an entry, or the table that it stands in, was --set."""
        return any(self.places.get(path[:length], "").startswith(SET) for length in range(1, len(path) + 1))

    def where(self, path: EntryPath) -> str:
        """Where an entry was written: itself, else the first entry of its table that was, else the table that it stands
        in."""
        inner = next((written for key, written in self.places.items() if key[:len(path)] == path), None)
        if inner is not None and path not in self.places:
            return inner
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.name

    @property
    def arguments(self) -> str:
        """The recipe as a command takes it: its file, and what was set beside it."""
        sets = [".".join(path) + "=" + json.dumps(reduce(lambda table, key: table[key], path, self.values))
                for path, place in self.places.items() if place.startswith(SET)]
        return " ".join([shlex.quote(self.name), *(f"--set {shlex.quote(text)}" for text in sets)])


def _table(path: EntryPath, value: Any) -> dict[str, Any]:
    """The table that stands at `path`: a text may stand for one, and anything else makes room for it."""
    if isinstance(value, dict):
        return value
    return {SHORT[path]: value} if path in SHORT and isinstance(value, str) else {}


def _renamed(path: EntryPath, names: Mapping[EntryPath, str]) -> EntryPath:
    """An entry's place by its name of today. In a stage it is named as in the recipe."""
    own = path[2:] if path[:1] == ("stages",) and len(path) > 2 else path
    before = path[:len(path) - len(own)]
    return (*before, *(names.get(own[:i + 1], part) for i, part in enumerate(own)))


def parse_set(texts: Iterable[str]) -> dict[str, Any]:
    """["train.lr=1e-3", "student=full"] -> dotted name -> value, each value read as YAML."""
    parsed: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise RequestError(f"--set {text}: should be a name and a value such as train.lr=1e-4")
        try:
            parsed[name.strip()] = unwrapped(read(value))
        except (YAMLError, ValueError) as error:
            why = "" if isinstance(error, YAMLError) else f": {error}"
            raise RequestError(f"--set {text[:200]}: '{value[:200]}' is no valid YAML value{why}") from None
    return parsed


def read(text: str) -> Any:
    """YAML of plain values. YAMLError for what is none, ValueError for tags, for what is no plain value, and for more
    or deeper than a recipe is: reading takes time for every mark, and for nested ones the square of it."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    if deepest > DEPTH:
        raise ValueError(f"it is nested too deeply: {deepest:,} brackets stand within each other, and at most "
                         f"{DEPTH} may")
    marks = len(_MARKS.findall(text))
    if marks > MARKS or len(text) > LENGTH:
        raise ValueError(f"it has {len(text):,} characters with {marks:,} commas, dashes, colons, brackets and "
                         f"the like, and a recipe has at most {LENGTH:,} with {MARKS:,}: long lists of prompts "
                         "belong into a .txt file, one a line")
    if (merges := len(_MERGE.findall(text))) > MERGES:
        raise ValueError(f"it takes tables into tables {merges} times (<<), and a recipe does so at most "
                         f"{MERGES} times")
    try:
        tree = YAML().load(text)
        _count(tree, {})
    except RecursionError:
        raise ValueError("it is nested too deeply, or an entry stands within itself") from None
    # ruamel.yaml on odd marks
    except (AttributeError, TypeError, KeyError, IndexError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"its marks stand where none can be ({type(error).__name__})") from None
    return tree


def _count(node: Any, known: dict[int, int]) -> int:
    """How many values a tree holds once anchors are written out. ValueError for too many, and for what is no plain
    value."""
    if id(node) in known:
        return known[id(node)]
    if isinstance(node, CommentedMap | CommentedSeq):
        if node.tag.value is not None:
            raise ValueError(f"it has the tag {str(node.tag.value)[:80]}: a recipe is made of plain values, "
                             "which have none")
        inner = node.values() if isinstance(node, CommentedMap) else node
        found = 1 + sum(_count(value, known) for value in inner)
    elif node is None or isinstance(node, bool | int | float | str):
        return 1
    else:
        raise ValueError(f"it has a {type(node).__name__} ({str(node)[:80]}): a recipe is made of tables, lists, "
                         "texts and numbers; write a text in quotes")
    if found > MARKS:
        raise ValueError(f"its anchors stand for more than {MARKS:,} values: write out what is meant")
    known[id(node)] = found
    return found


def _text(path: Path) -> str:
    """ValueError for more than a recipe can be, before it is read."""
    if (size := path.stat().st_size) > 4 * LENGTH:
        raise ValueError(f"it has {size:,} bytes, and a recipe has at most {LENGTH:,} characters")
    return path.read_text(encoding="utf-8")


def _lines(node: CommentedMap | CommentedSeq, path: EntryPath = ()) -> dict[EntryPath, int]:
    """Entry -> its line, from 0."""
    found: dict[EntryPath, int] = {}
    items = node.items() if isinstance(node, CommentedMap) else enumerate(node)
    for key, value in items:
        found[(*path, key)] = _line(node, key)
        if isinstance(value, CommentedMap | CommentedSeq):
            found |= _lines(value, (*path, key))
    return found


def _line(node: CommentedMap | CommentedSeq, key: Any) -> int:
    """Of one entry; of one that a table takes from another (`<<: *name`) where it was written there."""
    if isinstance(node, CommentedSeq):
        return node.lc.item(key)[0]
    if key in (node.lc.data or {}):
        return node.lc.key(key)[0]
    tables = (one[1] if isinstance(one, tuple) else one for one in node.merge)      # ruamel.yaml 0.18 has pairs
    return next(_line(table, key) for table in tables if key in table)


def leaves(overrides: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Path and value of all that is no table, or an empty one; a dotted name is a path."""
    for key, value in overrides.items():
        here = (*path, *key.split("."))
        if isinstance(value, Mapping) and value:
            yield from leaves(value, here)
        else:
            yield here, value


def entries(value: Any, path: EntryPath = ()) -> Iterator[tuple[EntryPath, Any]]:
    """Path and value of all that is neither a table nor a list."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from entries(inner, (*path, key))
    else:
        yield path, value


def unwrapped(value: Any) -> Any:
    """ruamel's scalars and containers as Python's own."""
    if isinstance(value, Mapping):
        return {str(key): unwrapped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [unwrapped(inner) for inner in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
