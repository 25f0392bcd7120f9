"""A run that is killed, however often and whenever, is the run that was left alone."""
from __future__ import annotations

import json
import random
import signal
import sys

import pytest

import stepdistill
from stepdistill.training import checkpoints

from .. import kills
from ..evaluation.conftest import clip_folder  # noqa: F401

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
UPDATES, SAVED, SHOWN = 24, 5, 4
TOY = {"train.updates": UPDATES, "train.checkpoint_every": SAVED, "train.log_every": 3, "evaluate.every": SHOWN,
       "data.batch": 16}
SHORT = {"train.updates": 6, "train.checkpoint_every": 2, "train.log_every": 1, "evaluate.every": 2}
TINY = """\
method: {method}
teacher: {teacher}
student: {{lora: {{rank: 2}}}}
guidance: 2.0
steps: 2
data: {{prompts: ["a red ring", "a blue square"], batch: 2}}
train: {{updates: 6, ema: 0.5}}
evaluate: {{nfe: [1, 2], samples: 60, reference: "shapes:200", features: {features}}}
"""


def sets(entries: dict) -> list[str]:
    return [text for name, value in entries.items() for text in ("--set", f"{name}={json.dumps(value)}")]


def drawn(seed: int, strikes: int, entries: dict) -> list[kills.Moment]:
    draw, updates = random.Random(seed), entries["train.updates"]
    return [kills.Moment.drawn(draw, updates, -(-updates // entries["train.checkpoint_every"]),
                               -(-updates // entries["evaluate.every"]))
            for _ in range(strikes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return stepdistill.train("toy/lcm", out=tmp_path_factory.mktemp("alone") / "run", **TOY)


@pytest.mark.long
def test_a_run_killed_between_a_checkpoint_and_its_picture_is_the_same_run(alone, tmp_path):
    moments = [kills.Moment(rows=0, checkpoints=4, pictures=0, seconds=0)]            # of step 20, which owes a picture
    began = kills.struck(["toy/lcm", *sets(TOY)], tmp_path / "run", moments)
    assert began == [0] and not kills.differences(alone, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
def test_toy_runs_are_the_same_however_often_they_are_killed(alone, tmp_path, seed):
    kills.struck(["toy/lcm", *sets(TOY)], tmp_path / "run", drawn(seed, 3, TOY))
    assert not kills.differences(alone, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_toy_runs_that_were_asked_to_end_are_the_same(alone, tmp_path, sent):
    began = kills.struck(["toy/lcm", *sets(TOY)], tmp_path / "run",
                         [kills.Moment(3, 0, 0, 0.0), kills.Moment(9, 0, 0, 0.1)], sent)
    assert (not kills.differences(alone, tmp_path / "run") or checkpoints.found(tmp_path / "run")
            != checkpoints.found(alone))
    assert began[0] == 0


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_stages_are_the_same_however_often_they_are_killed(tmp_path, seed):
    recipe = "toy/progressive"
    entries = {"train.updates": 6, "train.checkpoint_every": 2, "train.log_every": 2, "evaluate.every": 3,
               "data.batch": 16}
    whole = stepdistill.train(recipe, out=tmp_path / "whole", **entries)
    kills.struck([recipe, *sets(entries)], tmp_path / "run", drawn(seed, 3, entries))
    assert not kills.differences(whole, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize(("method", "seed"), [("lcm", 0), ("dmd2", 1)])
def test_pipelines_are_the_same_however_often_they_are_killed(tmp_path, tiny_teacher, clip_folder, monkeypatch, method,  # noqa: F811
                                                              seed):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.yaml"
    text = TINY.format(method=method, teacher=tiny_teacher, features=clip_folder)
    path.write_text(text.replace('prompts: ["a red ring", "a blue square"]', "images: shapes") if method == "lcm"
                    else text + "settings: {gan_weight: 0.0}\n")
    whole = stepdistill.train(path, out=tmp_path / "whole", **SHORT)
    kills.struck([path, *sets(SHORT)], tmp_path / "run", drawn(seed, 3, SHORT))
    assert not kills.differences(whole, tmp_path / "run") and len(kills.evaluations(whole)) == 6
