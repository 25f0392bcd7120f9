"""Inputs drawn by hypothesis: values that no entry expects, edits of texts, and damage to files of a folder."""
from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from hypothesis import strategies as st
from pydantic import BaseModel

from stepdistill.recipe.schema import Recipe

WORDS = ("", " ", "full", "shapes", "none", "nf4", "previous", "../../x", "/etc/passwd", "~", "$HOME", "a/b", "teacher",
         "teacher/unet", "pictures",
         "prompts.txt", "\x1b[31m", "\u202e", "[bold]", "<b>", "!!python/name:os.system", "1e400", "0x10", "inception",
         "auto", "null", "lcm", "é" * 9)
NUMBERS = (-1, 0, 1, 2, 3, 4, 7, 999, 1000, 1001, 2**31, 2**53, 2**63 - 1, 2**63, 10**30, -10**30)
plain = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(-5, 5), st.floats(),
                  st.sampled_from((1e-30, 1e30, 0.5, 1.5)),
                  st.sampled_from(WORDS), st.text(max_size=6))
junk = st.one_of(plain, st.lists(plain, max_size=3),
                 st.dictionaries(st.sampled_from((*WORDS[:9], "lora", "rank", "base", "prompts", "steps")), plain,
                                 max_size=2))


def entries(model: type[BaseModel] = Recipe, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every entry that a recipe can have, and tables themselves."""
    found = []
    for name, field in model.model_fields.items():
        here = (*path, field.alias or name)
        inner = [kind for kind in _kinds(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found += [here, *(entry for kind in inner for entry in entries(kind, here))]
    return list(dict.fromkeys(found))


def _kinds(annotation: Any) -> list[Any]:
    return [annotation, *(kind for inner in get_args(annotation) for kind in _kinds(inner))]


ENTRIES = (*entries(), ("settings", "nodes"), ("settings", "loss"), ("settings", "nothing"), ("stages",), ("nothing",),
           ("train", "nothing"))


def changed(table: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A recipe with an entry changed; tables are made where there are none."""
    if len(path) == 1:
        return table | {path[0]: value}
    inner = table.get(path[0])
    return table | {path[0]: changed(inner if isinstance(inner, dict) else {}, path[1:], value)}


@st.composite
def recipes(draw: st.DrawFn, base: Mapping[str, Any], least: int = 0) -> str:
    """A recipe with up to three entries that it should not have, or without some that it needs, as YAML."""
    table = dict(base)
    for path in draw(st.lists(st.sampled_from(ENTRIES), min_size=least, max_size=3)):
        table = changed(table, path, draw(junk))
    for name in draw(st.lists(st.sampled_from([*base]), max_size=1)):
        if draw(st.integers(0, 9)) == 0:
            table.pop(name, None)
    return json.dumps(table).replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")


PIECES = (b"", b"\0", b"\xff", b":", b"- ", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"<<: ", b"!!str ", b"!x ", b"|\n",
          b">\n", b"'", b'"', b"#", b"? ", b"\t",
          b"\n", b"---\n", b"%", b"@", b"`", b"\\", b"\xc3\x28", b"\xef\xbb\xbf", b"9" * 40, b"1e999", b"null", b"true",
          b"~", b"\r", b"\x1b[31m", b"{" * 70)


@st.composite
def edited(draw: st.DrawFn, data: bytes, most: int = 4) -> bytes:
    """Bytes with some stretches left out, written twice, or replaced by what means something to a parser."""
    for _ in range(draw(st.integers(1, most))):
        at, length = draw(st.integers(0, len(data))), draw(st.sampled_from((0, 0, 1, 2, 5, 17, 300)))
        data = data[:at] + draw(st.sampled_from(PIECES)) + data[at + length * draw(st.booleans()):]
    return data


@st.composite
def damage(draw: st.DrawFn, folder: Path, pattern: str = "*") -> list[tuple[str, str, Any]]:
    """What is done to files of a folder: (file, how, with what)."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file())
    found = []
    for name in draw(st.lists(st.sampled_from(files), min_size=1, max_size=2)):
        data = (folder / name).read_bytes()
        how = draw(st.sampled_from(("gone", "cut", "bytes", "folder", "link", "empty")
                                   + ("entry",) * 6 * (name.endswith(".json"))))
        if how == "bytes":
            found.append((name, how, draw(edited(data[:4000], 2)) + data[4000:]))
        elif how == "entry":
            found.append((name, how, draw(_entry(json.loads(data)))))
        else:
            found.append((name, how, draw(st.integers(0, max(0, len(data) - 1))) if how == "cut" else None))
    return found


@st.composite
def _entry(draw: st.DrawFn, value: Any) -> Any:
    """JSON with one value, at any depth, in place of another."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(junk)
    if isinstance(value, list):
        at = draw(st.integers(0, min(len(value), 50) - 1))
        return [*value[:at], draw(_entry(value[at])), *value[at + 1:]]
    name = draw(st.sampled_from(sorted(value)[:200]))
    if draw(st.integers(0, 5)) == 0:
        return ({key: inner for key, inner in value.items() if key != name}
                | {draw(st.sampled_from((*WORDS, "_class_name", "auto_map"))): value[name]})
    return value | {name: draw(_entry(value[name]))}


def spoil(folder: Path, done: list[tuple[str, str, Any]]) -> None:
    """Does it."""
    for name, how, what in done:
        path = folder / name
        if not path.is_file() or path.is_symlink():     # done already
            continue
        if how == "bytes":
            path.write_bytes(what)
        elif how == "entry":
            path.write_text(json.dumps(what))
        elif how == "cut":
            path.write_bytes(path.read_bytes()[:what])
        elif how == "empty":
            path.write_bytes(b"")
        else:
            path.unlink()
            if how == "folder":
                path.mkdir()
            elif how == "link":
                path.symlink_to("/etc/hostname")


def copied(source: Path, target: Path) -> Path:
    """A fresh copy, whatever lay there."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, symlinks=True))
