"""Folders of pictures with captions, in the layouts that `datasets` reads and those that trainers use."""
from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import RequestError
from .notices import say_once
from .picture import KINDS, SUFFIXES

Reads = Literal["texts", "classes", "nothing"]
TABLES = ("metadata.jsonl", "metadata.csv")
CAPTIONS = ("text", "caption", "prompt")          # a table's column with the captions, the first of them that it has
# may lie beside pictures
BESIDE = (".txt", ".caption", ".json", ".jsonl", ".csv", ".parquet", ".md", ".yaml", ".npz", "")


def picture_files(folder: Path) -> list[Path]:
    """Every picture under a folder and the folders linked there, by name. What is hidden, such as a file browser's
    thumbnails, is none. Files of other kinds are skipped, which is said."""
    found, others = [], Counter()
    for path in files_in(folder):
        if path.suffix.lower() in SUFFIXES:
            found.append(path)
        elif path.suffix.lower() not in BESIDE:
            others[path.suffix.lower()] += 1
    if found and others:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
        say_once(f"images: {others.total():,} files under '{folder}' are skipped, since they are no {KINDS} "
                 f"files: {kinds}")
    return sorted(found)


def files_in(folder: Path) -> Iterator[Path]:
    """Every file under it that is not hidden. A folder that is linked twice, or into itself, is gone through once."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for name in names if not name.startswith(".") and (path := Path(place, name)).is_file())


def captions_of(folder: Path, files: Sequence[Path], reads: Reads = "texts", is_video: bool = False) -> list[str]:
    """One of each file: from the nearest metadata.jsonl or metadata.csv above it, else from the .txt beside it; of
    "classes" also from the folder that it lies in. Videos may be folders. RequestError where one is missing, or where a
    table names a picture that is not there."""
    tables = _tables(folder, files)
    if not tables:
        return [_class_of(path, folder) if reads == "classes" else _beside(path) for path in files]
    found: dict[Path, str] = {}
    for table in tables:                          # the nearest comes last, and holds
        found |= dict(_of_table(table, set(files) if is_video else None))
    missing = [path for path in files if path not in found]
    if missing:
        raise RequestError(f"images: '{missing[0]}' has no caption: '{tables[0]}' does not list it (images that "
                           f"it does not list: {len(missing)}). Add a line for each, or move them elsewhere.")
    return [found[path] for path in files]


def captioned(folder: Path, files: Sequence[Path]) -> bool:
    """Whether captions are given: by tables, or beside the first picture."""
    return bool(_tables(folder, files)) or any(files[0].with_suffix(suffix).is_file()
                                               for suffix in (".txt", ".caption"))


def _tables(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Those of the folders that these files lie in, the folder's own first."""
    places = {place for parent in {file.parent for file in files} for place in (parent, *parent.parents)
              if place.is_relative_to(folder)}
    return [table for place in sorted(places, key=lambda place: (len(place.parts), place)) for name in TABLES
            if (table := place / name).is_file()]


def _of_table(table: Path, videos: set[Path] | None) -> Iterator[tuple[Path, str]]:
    for number, row in read_rows(table):
        name = row.get("file_name")
        text = caption_in(row)
        if not isinstance(name, str) or text is None:
            raise RequestError(f"images: line {number} of '{table}' should give a file_name and a caption "
                               f"({', '.join(CAPTIONS)}); found {_short(row)}")
        path = table.parent / name
        known = path in videos if videos is not None else path.is_file() and path.suffix.lower() in SUFFIXES
        if Path(name).is_absolute() or ".." in Path(name).parts or not known:
            raise RequestError(f"images: line {number} of '{table}' names '{name}', which is not a "
                               f"{KINDS if videos is None else 'video'} file of that folder.")
        yield path, checked(text, path, f"{table.name}, line {number}")


def read_rows(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a .jsonl or .csv file, with the number of the line that each stands on. RequestError for a line that
    is none."""
    text = read_text(table)
    if table.suffix == ".csv":
        lines = csv.DictReader(io.StringIO(text))
        yield from ((lines.line_num, row) for row in lines)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise RequestError(f"line {number} of '{table}' should be a table in JSON, such as {{\"file_name\": "
                                   f"..., \"text\": ...}}; found {line[:80]}")
            yield number, row


def caption_in(row: Mapping[str, Any]) -> object | None:
    """What a row says under the first of CAPTIONS that it has; of several captions of one picture the first. None
    without any."""
    value = next((row[name] for name in CAPTIONS if name in row), None)
    if isinstance(value, list | tuple) and value:
        say_once("images: some pictures have several captions each; the first one is taken")
        return value[0]
    return value


def read_text(path: Path) -> str:
    """UTF-8, or UTF-16 that begins with its mark; else Windows-1252, in which older programs of the West write, and
    that is said. RequestError where the system cannot read it."""
    try:
        held = path.read_bytes()
    except OSError as error:
        raise RequestError(f"'{path}' cannot be read as UTF-8 text ({error}).") from None
    return decoded(held, path)


def decoded(held: bytes, path: object) -> str:
    """As `read_text`, of what was read. RequestError for what is no text."""
    try:
        return held.decode("utf-16" if held.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\x00" in held or held.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            raise RequestError(f"'{path}' cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from None
    say_once(f"'{path}' is not UTF-8, and read as Windows-1252: save it as UTF-8 if its letters come out wrong. "
             "The same goes for others like it",
             "not UTF-8")
    return held.decode("cp1252", errors="replace")


def checked(text: object, path: object, place: str) -> str:
    """A caption. RequestError for an empty one."""
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"images: the caption of '{path}' is empty ({place}). Write what the image shows, or "
                           "remove the image.")
    return text.strip()


def _class_of(path: Path, folder: Path) -> str:
    if path.with_suffix(".txt").is_file():
        return _beside(path)
    if path.parent == folder:
        raise RequestError(f"images: '{path}' has no class. Put it into a folder of '{folder}' that is named by "
                           "its class, such as 3 or a label of the teacher's, or write that into "
                           f"'{path.with_suffix('.txt')}', as class 3.")
    return class_named(path.parent.name)


def class_named(name: str) -> str:
    """Of 3 "class 3"; a label stays."""
    return f"class {int(name)}" if name.isdecimal() else name


def _beside(path: Path) -> str:
    for suffix in (".txt", ".caption"):
        caption = path.with_suffix(suffix)
        if caption.is_file():
            return checked(read_text(caption), path, caption.name)
    raise RequestError(f"images: '{path}' has no caption. Write it into '{path.with_suffix('.txt')}', or list all "
                       "images in 'metadata.jsonl' with {\"file_name\": ..., \"text\": ...} on each line.")


def _short(row: Mapping[str, Any]) -> str:
    return json.dumps(row, default=str)[:80]


def digest_of(files: Sequence[Path], names: Sequence[str], captions: Sequence[str] | None = None) -> str:
    """Changes with any file's name, size, time of change or caption."""
    digest = hashlib.blake2b(digest_size=16)
    for i, (path, name) in enumerate(zip(files, names, strict=True)):
        stat = path.stat()
        digest.update(json.dumps([name, stat.st_size, stat.st_mtime_ns,
                                  *([] if captions is None else [captions[i]])]).encode())
    return digest.hexdigest()
