"""Pictures and figures of a run while it trains."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepdistill import api, resources, train
from stepdistill.data.images import ShapesImages
from stepdistill.data.shapes import render, scenes
from stepdistill.errors import RequestError
from stepdistill.evaluation.reference import FolderSource, ShapesSource
from stepdistill.evaluation.sweep import Evaluation

from ..evaluation.conftest import clip_folder  # noqa: F401

ROW = {"target": "student", "nfe": 1, "steps": 1, "guidance": 1.0, "latency_ms": None, "images_per_s": None,
       "metrics": {"fd": 1.0, "fd_low": 0.5, "fd_high": 1.5, "kid": 0.0, "precision": 1.0, "recall": 1.0,
                   "clip_score": None, "diversity": 1.0,
                   "all_attributes": None}}


def test_figures_follow_the_run_and_its_resumption(tmp_path, tiny_teacher, clip_folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ShapesSource.__init__, "__defaults__", (500,))
    recipe = {"method": "lcm", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "steps": 2,
              "guidance": [1.0, 3.0],
              "settings": {"guidance_embedding": True}, "data": {"images": "shapes", "batch": 2},
              "train": {"updates": 4, "checkpoint_every": 2},
              "evaluate": {"every": 2, "nfe": [1, 2], "samples": 60, "reference": "shapes",
                           "features": str(clip_folder)}}
    run = train(recipe, out=tmp_path / "run")
    lines = (run / "evaluations.jsonl").read_text()
    assert [(row["step"], row["nfe"]) for row in map(json.loads, lines.splitlines())] == [(2, 1), (2, 2),
                                                                                          (4, 1), (4, 2)]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]

    shutil.rmtree(run / "checkpoints/step-000004")
    train(recipe, out=run, resume=True)
    again = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["metrics"] for row in again] == [json.loads(line)["metrics"] for line in lines.splitlines()]


def test_too_few_samples_are_told_before_training(tmp_path, tiny_teacher, clip_folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ShapesSource.__init__, "__defaults__", (500,))
    with pytest.raises(RequestError, match="too few"):
        train({"method": "lcm", "teacher": str(tiny_teacher), "data": {"images": "shapes", "batch": 2},
               "train": {"updates": 1},
               "evaluate": {"every": 1, "samples": 5, "reference": "shapes", "features": str(clip_folder)}},
               out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("captions", [True, False])
def test_a_folder_is_a_reference_with_its_captions_or_the_datas(tmp_path, tiny_teacher, clip_folder, monkeypatch,  # noqa: F811
                                                                captions):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    pictures = render(scenes(torch.arange(110)))
    for i, picture in enumerate(pictures):
        (tmp_path / "own").mkdir(exist_ok=True)
        Image.fromarray(((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"own/{i}.png")
        if captions:
            (tmp_path / f"own/{i}.txt").write_text(f"number {i}")
    recipe = {"method": "lcm", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "steps": 2,
              "guidance": 2.0,
              "data": {"images": "shapes", "batch": 2}, "train": {"updates": 1},
              "evaluate": {"every": 1, "nfe": [1], "samples": 51, "reference": str(tmp_path / "own"),
                           "features": str(clip_folder)}}
    asked = []
    monkeypatch.setattr(Evaluation, "row", lambda self, plan: (asked.append(self.prompts) or ROW, None))
    run = train(recipe, out=tmp_path / "run")
    assert json.loads((run / "evaluations.jsonl").read_text())["step"] == 1
    files = FolderSource(tmp_path / "own", 51).files[:51]
    assert asked == [[f"number {file.stem}" for file in files] if captions
                     else ShapesImages().captions(torch.arange(51))]


def test_a_reference_that_cannot_serve_is_refused_at_its_line_before_anything_is_loaded(tmp_path, tiny_teacher,
                                                                                        monkeypatch):
    (tmp_path / "own").mkdir()
    recipe = {"method": "lcm", "teacher": str(tiny_teacher), "data": {"images": "shapes", "batch": 2},
              "train": {"updates": 1}, "evaluate": {"reference": str(tmp_path / "own")}}
    monkeypatch.setattr(api, "setup", None)
    with pytest.raises(RequestError, match="evaluate.reference is .*which nothing can be measured against: .* "
                       "holds 0 images"):
        train(recipe, out=tmp_path / "run")


def test_share_is_the_checkout():
    assert resources.SHARE == Path(__file__).parents[2]
