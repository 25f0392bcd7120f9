"""Figures of plugins in the rows of a bench, against what they are of known pictures and prompts."""
from __future__ import annotations

import json

import pytest
import torch
from diffusers import LCMScheduler
from tiny import tiny_pipeline

import stepdistill
from stepdistill.data.shapes import render, scenes
from stepdistill.errors import RequestError
from stepdistill.evaluation.own import bench_own
from stepdistill.evaluation.plans import Target, plans
from stepdistill.evaluation.reference import HELD_OUT_SEED, ShapesSource
from stepdistill.evaluation.sweep import bench
from stepdistill.recipe.plugins import Folder
from stepdistill.run.sources import marked

from ..evaluation.conftest import clip_folder, own_cache  # noqa: F401

SAMPLES = 60


@pytest.fixture
def student() -> Target:
    pipeline = tiny_pipeline(seed=1)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=4)
    return Target("student", pipeline, "lcm", {"guidance_scale": 1.0, "num_inference_steps": 1})


@pytest.fixture
def marks(mine):
    stepdistill.register_metric("letters", lambda pixels, prompts: torch.tensor([len(text) for text in prompts]),
                                prompts=True)
    return marked(["contrast", "letters"], Folder.open(mine))


def test_each_row_has_the_figures_of_its_own_pictures(student, marks, mine, clip_folder, tmp_path):  # noqa: F811
    assert marks == {"contrast": Folder.open(mine).sha256, "letters": "registered in this process"}
    asked = {"features": (clip_folder,), "reference": "shapes:400", "say": lambda text: None}
    results = bench([student], [1], SAMPLES, tmp_path / "out", metrics=marks, **asked)
    real, row = results["rows"]
    ids, prompts = torch.arange(SAMPLES), ShapesSource().prompts(SAMPLES)
    letters = sum(map(len, prompts)) / SAMPLES
    assert (real["metrics"]["contrast"]
            == pytest.approx(render(scenes(ids, HELD_OUT_SEED)).flatten(1).std(1).mean().item(), rel=1e-6))
    own = plans(student, [1], [], [], print)[0].images(prompts, ids, 0)
    assert row["metrics"]["contrast"] == pytest.approx(own.flatten(1).std(1).mean().item(), rel=1e-5)
    assert real["metrics"]["letters"] == row["metrics"]["letters"] == pytest.approx(letters)
    page = (tmp_path / "out/report.html").read_text()
    assert "contrast" in page and f"{row['metrics']['contrast']:.4g}" in page
    assert json.loads((tmp_path / "out/results.json").read_text())["protocol"]["metrics"] == marks
    with pytest.raises(RequestError, match="metrics is .*there and|another protocol"):
        bench([student], [1], SAMPLES, tmp_path / "out", **asked)                  # figures of other metrics do not mix


def test_a_bench_against_the_teacher_has_them_too(student, marks, tmp_path):
    teacher = Target("teacher", tiny_pipeline(), companion=True)
    results = bench_own([student, teacher], teacher, [1], tmp_path, guidance=[1.0], solvers=["ddim"],
                        prompts=["ab", "abcd"], samples=4,
                        say=lambda text: None, metrics=marks)
    row = next(row for row in results["rows"] if row["target"] == "student")
    own = plans(student, [1], [], [], print)[0].images(["ab", "abcd"] * 2, torch.arange(4), 0)
    assert (row["metrics"]["letters"] == 3 and row["metrics"]["contrast"]
            == pytest.approx(own.flatten(1).std(1).mean().item(), rel=1e-5))
    assert "contrast" in (tmp_path / "report.html").read_text()


def test_what_is_no_metric_is_refused(student, marks, tmp_path):
    with pytest.raises(RequestError, match="the metric contrats is no metric; did you mean contrast?"):
        marked(["contrats"], None)
    for name in ("fd", "Contrast"):
        with pytest.raises(RequestError, match="a metric is named by small letters"):
            stepdistill.register_metric(name, len)
    stepdistill.register_metric("odd", lambda pixels: pixels.mean())
    teacher = Target("teacher", tiny_pipeline())
    with pytest.raises(RequestError, match="the metric odd should give a tensor of 4 finite numbers, one a picture"):
        bench_own([student, teacher], teacher, [1], tmp_path, guidance=[1.0], solvers=["ddim"],
                  prompts=["a"], samples=4,
                  say=lambda text: None, metrics=marked(["odd"], None))
