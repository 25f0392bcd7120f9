"""The pages of docs/ that are written from the code are as the code says today."""
from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["PAGES"]


@pytest.mark.parametrize("page", PAGES)
def test_a_written_page_is_current(page):
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == PAGES[page]().rstrip() + "\n", \
        f"docs/{page} is not what the code says: run python scripts/make_docs.py"


WRITTEN = ("*.md", "pyproject.toml", "docs/**/*.md", "recipes/**/*.yaml", "scripts/**/*.sh", "scripts/**/*.md",
           "assets/*/README.md")                    # what people read as it stands


def test_lines_are_of_at_most_120_columns():
    """But for a row of a table, and for a picture, which Markdown wants in one line."""
    long = [f"{file.relative_to(ROOT)}:{number}" for pattern in WRITTEN for file in sorted(ROOT.glob(pattern))
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 120 and not line.startswith(("|", "!["))]
    assert not long
