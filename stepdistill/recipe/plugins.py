"""Plugins: methods, families, metrics and sources of data from outside, in a folder of one's own or in an installed
package.

A folder holds a file for each name, such as `methods/halves.py`; a package has an entry point of that name in the group
`stepdistill.methods`. What a recipe or a command asks for is imported, and nothing else. The file registers its name,
by `stepdistill.register_method` and its like. The files of a folder are modules of one package: `from ..shared import
f` reads shared.py beside methods/. Nothing here imports torch.
"""
from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, invalidate_caches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from .. import resources
from ..errors import RequestError, first_lines

REGISTERS = {"methods": "register_method", "families": "register_family", "metrics": "register_metric",
             "data": "register_data"}
# and the first digits of the folder's hash: a folder that has changed is read anew
PACKAGE = "stepdistill_plugins_"


@dataclass(frozen=True)
class Brought:
    """Where a registered name came from. mark: changes with what was imported."""

    place: str
    mark: str


BROUGHT: dict[tuple[str, str], Brought] = {}       # (kind, name): what plugins brought in this process


@dataclass(frozen=True)
class Folder:
    """path: absolute. sha256: of the names and contents of all its .py files."""

    path: Path
    sha256: str

    @classmethod
    def open(cls, name: str | Path) -> Folder:
        """RequestError for what is no folder of plugins."""
        path = resources.locate(name)
        if path is None or not path.is_dir():
            raise RequestError(f"there is no folder of plugins {name} (looked in {Path.cwd()}): put it back, or "
                               "name where it lies now")
        files = sorted(file for file in path.rglob("*.py")
                       if not any(part.startswith(".") for part in file.relative_to(path).parts))
        if not any(file.parent == path / kind for file in files for kind in REGISTERS):
            raise RequestError(f"{name} holds no plugins: expected a file for each name, such as "
                               f"{name}/methods/mine.py, in {', '.join(REGISTERS)}")
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0"
                          + hashlib.sha256(file.read_bytes()).digest())
        return cls(path, digest.hexdigest())

    def file(self, kind: str, name: str) -> Path | None:
        """That of a name, which may come from a file of others: what is no name of a module has none."""
        path = self.path / kind / f"{name}.py"
        return path if name.isidentifier() and path.is_file() else None

    def names(self, kind: str) -> list[str]:
        return sorted(path.stem for path in (self.path / kind).glob("*.py") if not path.stem.startswith("_"))

    def module(self, kind: str, name: str) -> ModuleType:
        """Imports one of its files, without leaving a __pycache__ there."""
        package = f"{PACKAGE}{self.sha256[:16]}"
        if package not in sys.modules:
            invalidate_caches()                    # the folder may be younger than the last look at its parent
            root = ModuleType(package, "A folder of plugins.")
            root.__path__ = [str(self.path)]
            sys.modules[package] = root
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            return import_module(f"{package}.{kind}.{name}")
        finally:
            sys.dont_write_bytecode = writes


def load(kind: str, name: str, table: Mapping[str, object], folder: Folder | None = None) -> None:
    """Has a plugin register `name` in the table of its kind; does nothing for a name that no plugin has.

    RequestError, with file and line, for one that cannot be imported; for one that registers another name; and where
    the folder has a file for a name that is there already, which is never replaced.
    """
    file = None if folder is None else folder.file(kind, name)
    known = BROUGHT.get((kind, name))
    if file is not None:
        _must_be_free(name, file, table, known, folder.sha256)
        if known is None or known.mark != folder.sha256:
            _import(lambda: folder.module(kind, name), str(file), folder.path)
            BROUGHT[kind, name] = Brought(str(file), folder.sha256)
            _must_be_there(kind, name, str(file), table)
    elif name not in table and (point := installed(kind).get(name)) is not None:
        place = f"{point.value}, an entry point of {named(point)}"
        _import(point.load, place)
        BROUGHT[kind, name] = Brought(place, named(point))
        _must_be_there(kind, name, place, table)


def installed(kind: str) -> dict[str, EntryPoint]:
    """Name -> its entry point, of all packages that are installed. None of them is imported."""
    return {point.name: point for point in entry_points(group=f"stepdistill.{kind}")}


def names(kind: str, folder: Folder | None = None) -> list[str]:
    """What plugins have, imported or not."""
    return sorted({*installed(kind), *(() if folder is None else folder.names(kind))})


def named(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def mark_of(kind: str, name: str) -> str | None:
    """Of what a plugin brought under this name: it changes with its code. None of what is no plugin's."""
    found = BROUGHT.get((kind, name))
    return None if found is None else found.mark


def _must_be_free(name: str, file: Path, table: Mapping[str, object], known: Brought | None, mark: str) -> None:
    if known is None and name in table:
        raise RequestError(f"{file}: {name} is there already, and is not replaced: give the file, and what it "
                           "registers, another name")
    if known is not None and known.place != str(file) and known.mark != mark:
        raise RequestError(f"{file}: {name} was read from {known.place} in this process already: give it another "
                           "name, or begin anew")


def _must_be_there(kind: str, name: str, place: str, table: Mapping[str, object]) -> None:
    if name not in table:
        raise RequestError(f"{place}: registers no {name!r}; it should call "
                           f"stepdistill.{REGISTERS[kind]}({name!r}, ...)")


def _import(read: Callable[[], object], place: str, within: Path | None = None) -> None:
    try:
        read()
    except (Exception, SystemExit) as error:
        said = (str(error) if isinstance(error, RequestError) else f"cannot be imported: {type(error).__name__}: "
                f"{first_lines(error)}")
        raise RequestError(f"{_line(error, within) or place}: {said}") from error


def _line(error: BaseException, within: Path | None) -> str | None:
    """FILE:LINE of the plugin's own that an error came from: of a folder's files the last one, of a package the
    first."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if "importlib" not in frame.filename and not Path(frame.filename).is_relative_to(resources.PACKAGE)]
    if within is not None:
        frames = [frame for frame in frames if Path(frame.filename).is_relative_to(within)][-1:]
    return f"{frames[0].filename}:{frames[0].lineno}" if frames else None
