"""Pictures and figures of a run while it trains."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stepdistill import resources, train
from stepdistill.errors import RequestError
from stepdistill.evaluation.reference import ShapesSource

from ..evaluation.conftest import clip_folder  # noqa: F401


def test_figures_follow_the_run_and_its_resumption(tmp_path, tiny_teacher, clip_folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ShapesSource.__init__, "__defaults__", (500,))
    recipe = {"method": "lcm", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "steps": 2, "guidance": [1.0, 3.0],
              "settings": {"guidance_embedding": True}, "data": {"images": "shapes", "batch": 2}, "train": {"updates": 4, "checkpoint_every": 2},
              "evaluate": {"every": 2, "nfe": [1, 2], "samples": 60, "reference": "shapes", "features": str(clip_folder)}}
    run = train(recipe, out=tmp_path / "run")
    lines = (run / "evaluations.jsonl").read_text()
    assert [(row["step"], row["nfe"]) for row in map(json.loads, lines.splitlines())] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]

    shutil.rmtree(run / "checkpoints/step-000004")
    train(recipe, out=run, resume=True)
    again = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["metrics"] for row in again] == [json.loads(line)["metrics"] for line in lines.splitlines()]


def test_too_few_samples_are_told_before_training(tmp_path, tiny_teacher, clip_folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ShapesSource.__init__, "__defaults__", (500,))
    with pytest.raises(RequestError, match="too few"):
        train({"method": "lcm", "teacher": str(tiny_teacher), "data": {"images": "shapes", "batch": 2}, "train": {"updates": 1},
               "evaluate": {"every": 1, "samples": 5, "reference": "shapes", "features": str(clip_folder)}}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_share_is_the_checkout():
    assert resources.SHARE == Path(__file__).parents[2]
