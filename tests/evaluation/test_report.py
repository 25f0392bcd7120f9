"""The picture, the table and the sheets."""
from __future__ import annotations

import io
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from stepdistill.errors import RequestError
from stepdistill.evaluation.curve import _distance_panel, best_per_nfe, curve, front, lines
from stepdistill.evaluation.estimate import share_of
from stepdistill.evaluation.protocol import Protocol
from stepdistill.evaluation.report import (
    as_csv,
    as_markdown,
    at_its_ease,
    join,
    ratio,
    read_results,
    table,
    write_report,
)
from stepdistill.evaluation.sheets import sheet


def row(target: str, nfe: int, fd: float, guidance: float | None = 2.0, attributes: float | None = 0.5) -> dict:
    return {"target": target, "method": None, "nfe": nfe, "steps": nfe, "guidance": guidance,
            "samples": 2000, "seed": 0,
            "metrics": {"fd": fd, "fd_low": fd - 0.1, "fd_high": fd + 0.1, "kid": 0.0, "precision": 1.0, "recall": 1.0,
                        "clip_score": None, "diversity": 1.0, "all_attributes": attributes},
            "latency_ms": 1.0, "images_per_s": None}


ROWS = [row("real", 0, -0.01, None), row("teacher:ddim", 4, 3.0), row("teacher:ddim", 4, 2.5, 1.0),
        row("teacher:heun", 4, 2.8),
        row("teacher:heun", 50, 0.05), row("lcm", 1, 2.0), row("lcm", 4, 1.0)]
PROTOCOL = Protocol("a/b@123", 64, None, "shapes:9@7", "none", "float32", "p", 2000, 0)


def test_the_best_teacher_is_picked_at_each_count_over_solvers_and_guidance():
    solvers, best, students = lines(ROWS)
    assert [(r["nfe"], r["metrics"]["fd"]) for r in best] == [(4, 2.5), (50, 0.05)]
    assert list(solvers) == ["teacher:ddim", "teacher:heun"] and len(solvers["teacher:ddim"]) == 1
    assert [r["nfe"] for r in students["lcm"]] == [1, 4]
    assert best_per_nfe([]) == []


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[5:], [row("lcm", 1, -0.2, attributes=None)]])
def test_any_table_can_be_drawn(rows):
    image = Image.open(io.BytesIO(curve(rows, 64)))
    assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 5


@pytest.mark.parametrize("least,scale", [(0.5, "log"), (0.05, "symlog"), (-0.2, "symlog")])
def test_a_distance_of_0_or_less_is_drawn_where_it_is(least, scale):
    """Also where the interval alone reaches 0: its end is not cut off at the axis."""
    rows = [row("real", 0, -0.01, None), row("lcm", 1, 2.0), row("lcm", 4, least)]
    axes = Figure().subplots()
    _distance_panel(axes, rows, 64)
    low, high = axes.get_ylim()
    assert axes.get_yscale() == scale and low < least - 0.1 and high > 2.0
    assert [line.get_ydata()[1] for line in axes.lines if len(line.get_ydata()) == 2][0] == least


def test_share_interval_is_wilsons():
    found = share_of(0.5, 100)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.4038, 0.5962), abs=1e-4)
    for n in range(1, 400):                       # whatever rounding does, the share lies in its interval
        assert all(share_of(share, n).low <= share <= share_of(share, n).high for share in (0.0, 1.0))
    assert share_of(1.0, 10).high == pytest.approx(1.0)


def test_the_table_holds_every_row():
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(table({"protocol": PROTOCOL.record(), "rows": ROWS}))
    text = console.export_text()
    assert text.count("teacher:ddim") == 2 and "2.500 [2.400, 2.600]" in text and "50.0%" in text


def test_the_ratio_is_to_the_teacher_at_its_ease():
    teacher = at_its_ease(ROWS)
    assert (teacher["target"], teacher["nfe"]) == ("teacher:heun", 50)
    found = ratio(row("lcm", 4, 1.0), row("teacher:ddim", 50, 2.0))
    spread = np.hypot(0.1 / 1.0, 0.1 / 2.0)                                       # half widths over values
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 * np.exp(-spread), 0.5 * np.exp(spread)))
    assert ratio(row("lcm", 4, -0.1), teacher) is None and at_its_ease(ROWS[5:]) is None


def test_the_ratios_interval_holds_what_it_says():
    """Two independent distances of 1 and 2, each known to 5 %."""
    draw, held = np.random.default_rng(0), 0
    for _ in range(400):
        one, other = draw.normal(1, 0.05), draw.normal(2, 0.1)
        rows = [row("a", 4, one), row("b", 4, other)]
        for made, half in zip(rows, (1.96 * 0.05, 1.96 * 0.1), strict=True):
            made["metrics"] |= {"fd_low": made["metrics"]["fd"] - half, "fd_high": made["metrics"]["fd"] + half}
        held += ratio(*rows).low <= 0.5 <= ratio(*rows).high
    assert 0.93 < held / 400 < 0.97


def test_tables_for_others(tmp_path):
    lines = as_csv(ROWS).splitlines()
    assert lines[0].startswith(
        "target,method,nfe,steps,guidance,samples,seed,latency_ms,images_per_s,fd,fd_low,fd_high,kid")
    assert len(lines) == 1 + len(ROWS) and lines[-1].startswith("lcm,,4,4,2.0,2000,0,1.0,,1.0,0.9,1.1,0.0,")
    made = as_markdown(ROWS).splitlines()
    assert (made[0] == "| target | NFE | w | FD [95 %] | all attributes | ms |" and made[-1] == "| lcm | 4 | 2 "
            "| 1.000 [0.900, 1.100] | 50.0% | 1.0 |")
    write_report({"protocol": PROTOCOL.record(), "rows": ROWS}, tmp_path)
    assert ((tmp_path / "table.csv").read_text() == as_csv(ROWS) and (tmp_path / "table.md").read_text()
            == as_markdown(ROWS))
    page = (tmp_path / "report.html").read_text()
    assert (page.count("<img class=\"figure\"") == 2 and "× teacher is FD over that of teacher:heun, 50 NFE" in page
            and "20.00 [" in page)


@pytest.mark.parametrize("rows", [ROWS, ROWS[5:], [row("lcm", 1, -0.2), row("lcm", 4, -0.3)]])
def test_the_front_can_be_drawn(rows):
    assert np.asarray(Image.open(io.BytesIO(front(rows))).convert("L")).std() > 5


def test_the_protocols_id_forgets_the_folder_and_nothing_else():
    assert replace(PROTOCOL, features="c/d@123").id == PROTOCOL.id
    others = {"features": "a/b@124", "dim": 65, "judge": "j", "reference": "r", "resize": "z", "dtype": "d",
              "prompts": "q",
              "samples": 1, "seed": 1, "estimator": "e", "also": ("x@1",), "metrics": {"contrast": "1"}}
    assert set(others) == {field.name for field in fields(Protocol)}
    assert (not {"also", "metrics"} & PROTOCOL.record().keys() and replace(PROTOCOL, also=("c/x@1",)).id
            == replace(PROTOCOL, also=("d/x@1",)).id)
    assert PROTOCOL.id == "e06cfeb4668bdfab", "figures of before stay comparable"
    for name, other in others.items():
        assert replace(PROTOCOL, **{name: other}).id != PROTOCOL.id, name


def test_joining_prefers_the_later_row_and_sorts():
    ours = {"protocol": PROTOCOL.record(), "rows": [row("lcm", 4, 1.0), row("lcm", 1, 9.0)]}
    theirs = {"protocol": PROTOCOL.record(), "rows": [row("lcm", 4, 0.5), row("teacher:ddim", 4, 3.0),
                                                      row("real", 0, 0.0, None)]}
    found = [(r["target"], r["nfe"], r["metrics"]["fd"]) for r in join(ours, theirs)["rows"]]
    assert found == [("real", 0, 0.0), ("teacher:ddim", 4, 3.0), ("lcm", 1, 9.0), ("lcm", 4, 0.5)]


def test_unreadable_results_are_named(tmp_path):
    for text in ("{", "[]", '{"rows": []}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(RequestError, match="results.json is damaged: .*Name a results.json that a bench wrote"):
            read_results(tmp_path / "results.json")


def test_a_sheet_holds_the_pictures_enlarged_by_a_whole_factor(tmp_path):
    teacher, student = torch.ones(3, 3, 32, 32), -torch.ones(3, 3, 32, 32)
    teacher[0, 0, 0, 0] = -1                                                     # one cyan pixel
    png = sheet([teacher, student], tmp_path / "deep" / "sheet.png")
    assert (tmp_path / "deep" / "sheet.png").read_bytes() == png
    levels = np.asarray(Image.open(io.BytesIO(png)))
    assert levels.shape == (2 * 100 + 4, 3 * 100 + 4, 3)
    assert (levels[4:7, 4:7] == (0, 255, 255)).all() and (levels[7, 7] == 255).all()
    assert (levels[104:200, 4:100] == 0).all()


def test_a_sheet_takes_labels_for_rows_and_arranges_a_single_batch():
    images = torch.zeros(9, 3, 32, 32)
    assert Image.open(io.BytesIO(sheet(images))).size == (304, 304)
    labelled = Image.open(io.BytesIO(sheet([images[:2], images[:2]], captions=["teacher", "student"])))
    assert labelled.width > 204
    with pytest.raises(ValueError, match="2 captions for 1 rows"):
        sheet([images], captions=["a", "b"])
