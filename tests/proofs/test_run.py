"""The command's own part: processes, rows, files."""
from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from stepdistill.cli import app
from stepdistill.errors import RequestError
from stepdistill.proofs import run
from stepdistill.proofs.run import Task, measure, verify


def test_rows_are_measured_in_processes_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "KINDS", ("convergence", "identity"))
    mine = tmp_path / "work"                        # what lies there is not verify's
    mine.mkdir()
    seen = []
    found = verify("kd", "kd", seed=3, out=tmp_path, fast=True, done=seen.extend)
    written = json.loads((tmp_path / "verify.json").read_text())
    assert written == found and len(found["rows"]) == len(seen) and found["seed"] == 3
    assert {row["method"] for row in found["rows"]} == {"kd"} and all(row["passed"] for row in found["rows"])
    assert set(found["rows"][0]) == {"method", "kind", "check", "figure", "tolerance", "passed"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "verify.json", "work"]


def test_what_cannot_be_measured_is_a_row_that_fails(tmp_path):
    (tmp_path / "logs").mkdir()
    row, = measure(Task("nobody", "identity", "nobody", 0, tmp_path, tmp_path / "w"))
    assert not row.passed and row.figure is None and "could not be measured: ModuleNotFoundError" in row.check
    assert "Traceback" in (tmp_path / "logs" / "nobody-identity.log").read_text()


def test_an_unknown_method_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RequestError, match="did you mean 'swiftbrush'"):
        verify("swiftbrushes", out=tmp_path / "v")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("passed, status", [(True, 0), (False, 1)])
def test_the_exit_status_says_whether_all_rows_pass(monkeypatch, passed, status):
    row = {"method": "kd", "kind": "identity", "check": "c", "figure": None, "tolerance": 1.0, "passed": passed}
    monkeypatch.setattr(run, "verify", lambda *names, **options: {"seed": 0, "seconds": 1.0, "rows": [row]})
    shown = CliRunner().invoke(app, ["verify", "kd", "--json"])
    assert shown.exit_code == status and json.loads(shown.stdout)["rows"] == [row]
