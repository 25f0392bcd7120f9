"""What there is: methods and recipes, read without importing torch."""
from __future__ import annotations

import ast
import dataclasses
import difflib
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from .. import resources
from ..errors import RequestError
from ..methods import METHODS, REGISTERED
from . import plugins as outside
from .yaml import Source

COMPOSED = {"hyper": "tscd"}         # recipes of a paper's line of methods as stages -> the first of these


def methods(name: str | None = None, plugins: str | Path | None = None) -> list[dict[str, Any]]:
    """[{name, title, arxiv, family, needs, data, steps}], of one method where a name is given. plugins: a folder, whose
    methods are listed too; one of an installed package is found by its name."""
    folder = None if plugins is None else outside.Folder.open(plugins)
    for asked in ([] if folder is None else folder.names("methods")) if name is None else [name]:
        outside.load("methods", asked, METHODS, folder)
    if name is not None and name not in METHODS:
        known = [*METHODS, *outside.names("methods", folder)]
        near = difflib.get_close_matches(name, known, n=1)
        raise RequestError(f"there is no method '{name}'; "
                           + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"))
    keys = ("title", "arxiv", "family", "needs", "data", "steps")
    return [{"name": key, **{k: v if isinstance(v, str) else list(v)
                             for k, v in dataclasses.asdict(entry).items() if k in keys}}
            for key, entry in METHODS.items() if name in (None, key)]


def algorithm(name: str) -> str:
    """A method's own words: its file's docstring, and its settings with their comments, as they stand in the source."""
    module = METHODS[name].module
    spec = find_spec(module if name in REGISTERED else f"stepdistill.methods.{module}")
    source = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(source)
    settings = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    fields = [node for node in settings.body if isinstance(node, ast.AnnAssign)]
    lines, first, last = source.splitlines(), fields[0].lineno - 1, fields[-1].end_lineno
    # the last one's comment may go on
    more = takewhile(lambda line: line.lstrip().startswith("#"), lines[last:])
    return "\n".join([ast.get_docstring(tree), "", "settings:", *lines[first:last], *more])


def recipes(name: str | None = None, plugins: str | Path | None = None) -> list[dict[str, str]]:
    """[{name, path, method, teacher}] of the recipes that ship and those of a folder of plugins, or of the one that
    `name` finds."""
    found = builtin(plugins) if name is None else {name: find(name, plugins)}
    rows = []
    for key, path in found.items():
        values = Source.of_file(path).values
        teacher = values.get("teacher", "")
        rows.append({"name": key, "path": str(path), "method": values.get("method", ""),
                     "teacher": teacher.get("base", "") if isinstance(teacher, dict) else teacher})
    return rows


def find(name: str | Path, plugins: str | Path | None = None) -> Path:
    """A recipe by its path, by its built-in name, or by its name in a folder of plugins, whose recipes/ is as that
    which ships."""
    for candidate in (str(name), f"recipes/{name}.yaml", f"recipes/{name}",
                      *(() if plugins is None else (Path(plugins) / f"recipes/{name}.yaml",))):
        path = resources.locate(candidate)
        if path is not None and path.is_file():
            return path
    near = difflib.get_close_matches(str(name), list(builtin(plugins)), n=1)
    raise RequestError(f"there is no recipe '{name}': expected a YAML file or a built-in name; "
                       + (f"did you mean {near[0]}?" if near else f"built in are {', '.join(builtin())}"))


def method_of(path: Path) -> str:
    """Whose recipe a file is, by its name."""
    name = path.stem.split("-")[0]
    return COMPOSED.get(name, name)


def builtin(plugins: str | Path | None = None) -> dict[str, Path]:
    """Name -> file of the recipes that ship, which go before those of a folder of plugins."""
    roots = [*(() if plugins is None else (Path(plugins).resolve() / "recipes",)), resources.SHARE / "recipes"]
    return {path.relative_to(root).with_suffix("").as_posix(): path for root in roots
            for path in sorted(root.glob("*/*.yaml"))}
