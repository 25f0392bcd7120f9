"""What is read back is checked entry by entry, and what is damaged is named."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest

from stepdistill.errors import RequestError
from stepdistill.files import records

ROOT = Path(__file__).parents[2]


class Inner(TypedDict):
    x: float


class Outer(TypedDict):
    kind: Literal["a", "b"]
    inner: list[Inner]
    table: dict[str, int | None]
    anything: Any
    flag: bool


GOOD = {"kind": "a", "inner": [{"x": 1}, {"x": 0.5}], "table": {"n": 3, "m": None}, "anything": [1, {}], "flag": True,
        "more": "of a later version"}


def test_what_fits_is_given_back():
    assert records.checked(json.dumps(GOOD), Outer) == GOOD


@pytest.mark.parametrize(("change", "message"), [
    ({"kind": "c"}, "kind is 'c', and should be 'a' or 'b'"),
    ({"inner": [{"x": 1}, {}]}, r"inner\[1\] has no x"),
    ({"inner": [{"x": True}]}, r"inner\[0\].x is True, and should be a finite number"),
    ({"inner": {}}, "inner is {}, and should be a list"),
    ({"table": {"n": 1.5}}, "table.n is 1.5, and should be a whole number or null"),
    ({"table": {"n": 10**30}}, "table.n is 1000000000000000000000000000000, and should be a whole number or null"),
    ({"table": None}, "table is None, and should be a table"),
    ({"flag": 1}, "flag is 1, and should be true or false")])
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        records.checked(json.dumps(GOOD | change), Outer)


def test_configs_of_diffusers_may_hold_infinities():
    """DPMSolverMultistepScheduler's lambda_min_clipped is one."""
    assert (records.checked('{"_class_name": "A", "x": -Infinity}', records.SchedulerConfig, infinite=True)["x"]
            == -float("inf"))
    with pytest.raises(ValueError, match="holds NaN"):
        records.checked('{"_class_name": "A", "x": NaN}', records.SchedulerConfig, infinite=True)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"x": NaN}', b'{"x": -Infinity}',
                                  b'{"x": ' + b"9" * 5000 + b"}",
                                  b'{"x": 1e999}', b"null", b'{"x": "1"}'])
def test_no_damage_raises_anything_else(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_bytes(text)
    with pytest.raises(RequestError, match=r"file.json is damaged: .*\. Make it anew"):
        records.read(path, Inner, "Make it anew")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RequestError, match="absent.json is damaged: No such file or directory. Make it"):
        records.read(tmp_path / "absent.json", Inner, "Make it anew")


def test_what_ships_fits():
    for path in ROOT.glob("assets/**/results.json"):
        assert records.read(path, records.Results, "")["rows"]
    for path in [*ROOT.glob("assets/students/*/stepdistill.json"),
                 *ROOT.glob("tests/fixtures/*/export/stepdistill.json")]:
        assert records.read(path, records.Export, "")["method"]
