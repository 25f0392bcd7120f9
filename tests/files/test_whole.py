"""Files are there whole or not at all."""
from __future__ import annotations

import os

import pytest

from stepdistill.files import whole


def test_a_file_takes_its_name_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "new/file.json"
    whole.write_whole(path, b"old")

    def full(_):
        assert path.read_bytes() == b"old" and whole.aside_of(path).exists()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", full)
        whole.write_whole(path, b"new, and longer")
    assert path.read_bytes() == b"old" and [one.name for one in path.parent.iterdir()] == ["file.json"]


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    whole.aside_of(tmp_path / "a.json").write_bytes(b"half")
    (whole.aside_of(tmp_path / "step-000002") / "inner").mkdir(parents=True)
    for name in (".hidden", "a.partial", "a.json"):
        (tmp_path / name).write_bytes(b"")
    whole.sweep(tmp_path)
    whole.sweep(tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.json", "a.partial"]


def test_what_is_damaged_keeps_all_its_states(tmp_path):
    for text in ("one", "two"):
        (tmp_path / "log").write_text(text)
        whole.put_aside(tmp_path / "log")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"damaged-1-log": "one",
                                                                            "damaged-2-log": "two"}
