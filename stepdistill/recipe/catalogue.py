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
from ..methods import METHODS
from .yaml import Source


def methods(name: str | None = None) -> list[dict[str, Any]]:
    """[{name, title, arxiv, family, needs, data, steps}], of one method where a name is given."""
    if name is not None and name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        raise RequestError(f"there is no method '{name}'; "
                           + (f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}"))
    keys = ("title", "arxiv", "family", "needs", "data", "steps")
    return [{"name": key, **{k: v if isinstance(v, str) else list(v)
                             for k, v in dataclasses.asdict(entry).items() if k in keys}}
            for key, entry in METHODS.items() if name in (None, key)]


def algorithm(name: str) -> str:
    """A method's own words: its file's docstring, and its settings with their comments, as they stand in the source."""
    spec = find_spec(f"stepdistill.methods.{METHODS[name].module}")
    source = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(source)
    settings = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    fields = [node for node in settings.body if isinstance(node, ast.AnnAssign)]
    lines, first, last = source.splitlines(), fields[0].lineno - 1, fields[-1].end_lineno
    # the last one's comment may go on
    more = takewhile(lambda line: line.lstrip().startswith("#"), lines[last:])
    return "\n".join([ast.get_docstring(tree), "", "settings:", *lines[first:last], *more])


def recipes(name: str | None = None) -> list[dict[str, str]]:
    """[{name, path, method, teacher}] of the recipes that ship, or of the one that `name` finds."""
    found = builtin() if name is None else {name: find(name)}
    rows = []
    for key, path in found.items():
        values = Source.of_file(path).values
        teacher = values.get("teacher", "")
        rows.append({"name": key, "path": str(path), "method": values.get("method", ""),
                     "teacher": teacher.get("base", "") if isinstance(teacher, dict) else teacher})
    return rows


def find(name: str | Path) -> Path:
    """A recipe by its path, or by its built-in name."""
    for candidate in (str(name), f"recipes/{name}.yaml", f"recipes/{name}"):
        path = resources.locate(candidate)
        if path is not None and path.is_file():
            return path
    near = difflib.get_close_matches(str(name), list(builtin()), n=1)
    raise RequestError(f"there is no recipe '{name}': expected a YAML file or a built-in name; "
                       + (f"did you mean {near[0]}?" if near else f"built in are {', '.join(builtin())}"))


def builtin() -> dict[str, Path]:
    """Name -> file of the recipes that ship."""
    root = resources.SHARE / "recipes"
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("*/*.yaml"))}
