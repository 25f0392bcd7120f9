"""The demo from training to the curve, on tiny random networks: what it leaves, and what it says."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import stepdistill
from stepdistill import demo, resources
from stepdistill.evaluation.reference import ShapesSource
from stepdistill.recipe import Recipe

from .evaluation.conftest import clip_folder  # noqa: F401


@pytest.fixture
def small_world(tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder whose assets are found before those that ship."""
    shutil.copytree(clip_folder, tmp_path / "assets/shapes-clip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resources, "SHARE", tmp_path)
    monkeypatch.setattr(ShapesSource.__init__, "__defaults__", (500,))
    return tmp_path


@pytest.fixture
def recipe(tiny_teacher: Path) -> Recipe:
    return Recipe.load({"method": "lcm", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
                        "guidance": 2.0, "steps": 4,
                        "data": {"images": "shapes", "count": 8, "cache": True, "batch": 4}, "train": {"updates": 2}})


def test_the_demo(small_world, recipe, capsys):
    out = small_world / "demo"
    results = demo.demo(recipe, out, samples=60)
    assert {"results.json", "curve.png", "report.html", "samples.png", "recipe.yaml"} <= {path.name
                                                                                          for path in out.iterdir()}
    rows = {(row["target"], row["nfe"]) for row in results["rows"]}
    assert {("real", 0), ("teacher:ddim", 4), ("teacher:dpmpp_2m", 50), ("student", 1), ("student", 4),
            ("student", 8)} <= rows
    assert json.loads((out / "results.json").read_text())["rows"] == results["rows"]
    assert "dpmpp_2m" in (out / "export/lora/README.md").read_text()          # the card holds the measured table
    output = capsys.readouterr().out
    assert "% of the gap" in output and "curve.png" in output


def test_a_model_of_ones_own_is_measured_against_its_teacher(small_world, recipe, capsys):
    """Shapes would say nothing about it: no distance to them is taken unless it is asked for."""
    run = stepdistill.train(recipe, out=small_world / "run")
    found = stepdistill.bench(run, nfe=(2,), samples=4, out=small_world / "own", solvers=("ddim",),
                              prompts=["a red ring", "a blue cross"])
    assert "measuring against the teacher's own pictures from the same noise" in capsys.readouterr().err
    rows = [(row["target"], row["steps"], row["guidance"]) for row in found["rows"]]
    assert rows == [("teacher:ddim", 25, 2.0), ("run", 2, 1.0), ("teacher:ddim", 2, 1.0), ("teacher:ddim", 1, 2.0)]
    made = found["rows"][1]["made"]
    assert (made["weights"] == "run" and made["lora"] == "merged"
            and made["teacher"] == {"weights": Path(recipe.teacher.base).name})
    assert "torch" in made["versions"]
    assert (small_world / "own/report.html").is_file() and (small_world / "own/samples/together.png").is_file()


def test_bench_takes_runs_exports_and_pipelines(small_world, recipe, tiny_teacher):
    """A run and its export are one student; their teacher stands in the table unasked."""
    run = stepdistill.train(recipe, out=small_world / "run")
    folder = stepdistill.export(run, out=small_world / "lora")
    found = stepdistill.bench(run, folder, nfe=(2,), samples=60, out=small_world / "bench", solvers=("ddim",),
                              reference="shapes")
    rows = {row["target"]: row for row in found["rows"]}
    assert set(rows) == {"real", "run", "lora", "teacher:ddim"} and rows["teacher:ddim"]["guidance"] == 2.0
    assert rows["run"]["metrics"]["fd"] == pytest.approx(rows["lora"]["metrics"]["fd"], abs=1e-4)
    alone = stepdistill.bench(tiny_teacher, nfe=(2,), samples=60, out=small_world / "alone", solvers=("ddim",),
                              guidance=(1.0, 2.0),
                              reference="shapes")
    assert [(row["target"], row["steps"]) for row in alone["rows"]] == [("real", 0), ("teacher:ddim", 2),
                                                                        ("teacher:ddim", 1)]
    same = [row for row in alone["rows"] if row["guidance"] == 2.0][0]
    assert same["metrics"] == rows["teacher:ddim"]["metrics"]


def test_the_share_of_the_gap():
    def row(target: str, nfe: int, fd: float) -> dict:
        return {"target": target, "nfe": nfe, "metrics": {"fd": fd}}
    rows = [row("teacher:ddim", 4, 9.0), row("teacher:heun", 4, 8.0), row("teacher:ddim", 50, 2.0),
            row("student", 4, 5.0), row("student", 1, 1.0)]
    assert demo.closed({"rows": rows})["closed"] == 0.5
