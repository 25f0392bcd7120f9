"""What trackers are shown: each step's figures and the pictures, by TensorBoard as it reads its own files and by a
wandb that remembers."""
from __future__ import annotations

import io
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stepdistill
from stepdistill.errors import RequestError
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check

TOY = {"train.updates": 2, "train.checkpoint_every": 1, "train.log_every": 1, "train.warmup": 0,
       "train.decay": "constant", "data.batch": 16,
       "evaluate.every": 1}


class Wandb(ModuleType):
    """As much of it as accelerate uses."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__, self.begun, self.logged, self.ended = ModuleSpec("wandb", None), [], [], 0
        self.Image = lambda pixels: pixels

    def init(self, **given):
        self.begun.append(given)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.ended += 1


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_figures_and_pictures_reach_both(wandb, tmp_path):
    run = stepdistill.train("toy/lcm", out=tmp_path / "run",
                            **TOY | {"train.updates": 1, "train.trackers": ["tensorboard", "wandb"]})
    stepdistill.train("toy/lcm", out=run, resume=True, **TOY | {"train.trackers": ["tensorboard", "wandb"]})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pictures = {step: np.asarray(Image.open(run / f"samples/step-{step:06d}.png").convert("RGB")) for step in (1, 2)}

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    for row in rows:
        known = {event.step: event.value for event in board.Scalars("student/consistency")}
        assert known[row["step"]] == pytest.approx(row["student/consistency"], rel=1e-6)
    shown = {event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
             for event in board.Images("samples")}
    assert all(np.array_equal(shown[step], pictures[step]) for step in (1, 2))

    first, again = wandb.begun
    assert (first["project"] == "stepdistill" and first["name"] == "run" and first["id"] == again["id"]
            and again["resume"] == "allow")
    assert first["config"]["lr"] == 2e-3 and wandb.ended == 2
    losses = {step: values for step, values in wandb.logged if "student/consistency" in values}
    assert ({step: values["student/consistency"] for step, values in losses.items()}
            == {row["step"]: row["student/consistency"] for row in rows})
    drawn = {step: values["samples"] for step, values in wandb.logged if "samples" in values}
    assert all(np.array_equal(drawn[step][0], pictures[step]) for step in (1, 2))


def test_none_are_wanted(tmp_path):
    run = stepdistill.train("toy/lcm", out=tmp_path / "run", **TOY | {"train.updates": 1, "train.trackers": []})
    assert not (run / "tensorboard").exists() and (run / "metrics.jsonl").is_file()


def test_one_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("stepdistill.run.checks.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"train.trackers names wandb, which is not installed: pip install "
                       r"stepdistill\[wandb\]"):
        check(Recipe.load("toy/lcm", {"train.trackers": ["wandb"]}))
    with pytest.raises(RequestError, match="train.trackers.0 is 'comet'; it should be 'tensorboard' or 'wandb'"):
        Recipe.load("toy/lcm", {"train.trackers": ["comet"]})
