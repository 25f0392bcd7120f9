"""What a run says where there is no terminal, and what a terminal of 80 columns shows."""
from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from stepdistill import api
from stepdistill.evaluation.progress import duration, meter
from stepdistill.evaluation.report import table
from stepdistill.recipe import catalogue
from stepdistill.run.telling import log, recorded, spoken, write_in
from stepdistill.training.tracking import _Bar

from ..conftest import ROOT


def recipe(teacher):
    return {"method": "lcm", "teacher": str(teacher), "student": {"lora": {"rank": 2}}, "steps": 2, "guidance": 2.0,
            "data": {"images": "shapes", "batch": 2}, "train": {"updates": 4, "log_every": 2, "checkpoint_every": 2}}


def test_a_run_says_where_it_is(tiny_teacher, tmp_path, capsys):
    steps = []
    run = api.train(recipe(tiny_teacher), out=tmp_path / "a run", on_step=steps.append)
    assert steps == [1, 2, 3, 4]
    lines = [line[9:] for line in capsys.readouterr().err.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert (lines[0] == "checking recipe"
            and lines[1].startswith(f"lcm, 2 steps; loading the teacher {tiny_teacher} on cpu"))
    assert f"training 4 steps of 2 samples in {run}" in lines
    assert [line.split(":")[0] for line in lines if line.startswith("step ")] == [
        "step 2 of 4", "step 2 of 4 is kept", "step 4 of 4", "step 4 of 4 is kept"]
    assert re.fullmatch(r"step 2 of 4: consistency [\d.e-]+, [\d.]+ images/s, [\d.]+ GiB, 0:\d\d:\d\d left",
                        next(line for line in lines if line.startswith("step 2 of 4:")))
    assert [line[20:] for line in (run / "train.log").read_text().splitlines()] == lines


def test_the_first_line_comes_before_torch_is_loaded(tmp_path):
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "stepdistill", "train", "shapes/lcm", "--set", "train.updates=1",
                                "--out", "run"], cwd=tmp_path,
                               env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    first, seconds = process.stderr.readline(), time.monotonic() - begun
    process.kill()
    process.communicate()
    assert first == "loading torch and diffusers\n" and seconds < 5, (first, seconds)


def test_an_error_stands_in_the_log_and_what_came_before_the_folder_too(tmp_path):
    with pytest.raises(ValueError), spoken(), recorded() as record:
        log.info("before")
        write_in(tmp_path, record)
        raise ValueError("[odd] path")
    assert [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()] == [
        "before", "stopped: ValueError: [odd] path"]
    assert not log.handlers and log.propagate


def test_a_meter_speaks_at_first_and_at_the_end(capsys):
    with spoken(), meter() as report:
        for done in (1, 2, 3):
            report("caching prompts", done, 3)
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == ["caching prompts: 1 of 3",
                                                                           "caching prompts: 3 of 3"]
    assert [duration(seconds) for seconds in (12.3, 200, 7500)] == ["12 s", "3 min 20 s", "2 h 5 min"]


def test_80_columns_hold_the_bar_and_its_figures():
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    console = Console(width=80, file=io.StringIO(), force_terminal=True, record=True)
    bar = _Bar(TextColumn("training"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"),
               TimeRemainingColumn(), console=console)
    bar.add_task("training", total=120_000, completed=100_000)
    bar.figures = ", ".join(f"loss_{i} 0.1234" for i in range(8)) + ", 160.5 images/s, 12.50 GiB"
    for part in bar.get_renderables():
        console.print(part)
    shown = console.export_text()
    assert "100000/120000" in shown and "…" not in shown and "160.5 images/s" in shown.replace("\n", " ")


def test_80_columns_hold_the_table_of_a_bench():
    metrics = {"fd": 209.8123, "fd_low": 160.1234, "fd_high": 250.0, "kid": 0.0, "precision": 1.0, "recall": 1.0,
               "clip_score": 31.0,
               "diversity": 1.0, "all_attributes": 0.935}
    row = {"target": "a-teacher-of-a-long-name:dpmpp_2m", "nfe": 50, "steps": 25, "guidance": 7.5, "metrics": metrics,
           "latency_ms": 1234.5,
           "images_per_s": 1.0}
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table({"protocol": {"samples": 2000, "reference": "r", "features": "f"}, "rows": [row]}))
    shown = console.export_text()
    for figure in ("209.8 [160.1, 250]", "50", "7.5", "93.5%", "1234.5"):
        assert figure in shown, shown
    assert "…" not in shown


def test_a_table_in_a_pipe_has_a_row_a_line(tmp_path):
    """So that what is in it can be searched for and pasted."""
    done = subprocess.run([sys.executable, "-m", "stepdistill", "recipes"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "40"},
                          capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(catalogue.recipes()) and any(line.split() == ["shapes/lcm", "lcm", "assets/shapes-sd"]
                                                              for line in lines)
