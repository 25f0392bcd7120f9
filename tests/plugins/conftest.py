"""The folder of docs/plugins.md, to the letter."""
from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from stepdistill.data.sources import SOURCES
from stepdistill.evaluation.metrics import METRICS
from stepdistill.methods import METHODS, REGISTERED
from stepdistill.models.families import FAMILIES
from stepdistill.recipe import plugins

PAGE = (Path(__file__).parents[2] / "docs/plugins.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`mine/([\w/.]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [shlex.split(line)[1:] for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
            for line in block.splitlines()]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "mine"


@pytest.fixture(autouse=True)
def forgotten():
    """What a test registers is gone after it."""
    tables = (METHODS, REGISTERED, FAMILIES, METRICS, SOURCES, plugins.BROUGHT)
    before = [dict(table) for table in tables]
    yield
    for table, was in zip(tables, before, strict=True):
        table.clear()
        table.update(was)
    for name in [name for name in sys.modules if name.startswith(plugins.PACKAGE)]:
        del sys.modules[name]
