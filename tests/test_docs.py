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
