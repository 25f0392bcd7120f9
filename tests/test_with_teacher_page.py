"""docs/with_teacher.md: its lines of Python run as they stand."""
from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_s_python_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "docs/with_teacher.md").read_text(encoding="utf-8"), re.DOTALL)
    found: dict = {}
    exec(code, found)                                   # noqa: S102
    assert capsys.readouterr().out.strip().endswith("5 {'student': 3, 'teacher': 2}")
    assert Image.open("with_teacher.png").size == (32, 32) and len(found["turns"]) == 4
