"""float16 with a loss scale, and what a card must have."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from stepdistill import api
from stepdistill.errors import RequestError, Stopped
from stepdistill.methods.base import Update
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run import cards
from stepdistill.run.setup import setup
from stepdistill.training import checkpoints

from .toy import ToyMethod, trainer


def recipe(teacher, method: str = "lcm", **changes) -> Recipe:
    data = {"images": "shapes", "count": 8, "batch": 4}
    return Recipe.load({"method": method, "teacher": str(teacher), "student": {"lora": {"rank": 2}},
                        "guidance": 2.0, "steps": 2,
                        "data": data, "train": {"updates": 2}}, changes)


class Overflows(ToyMethod):
    """Its student's loss is so large in steps 2 and 3 that a gradient scaled by 65,536 has no float32."""

    def updates(self):
        return [Update(("student",), self.loss)]

    def loss(self, batch, step):
        huge = 1e36 if step.index in (2, 3) else 1.0
        return {"match": self.roles["student"](batch.x0).float().square().mean() * huge}


def test_an_overflow_in_fp16_leaves_the_step_out_and_halves_the_scale(tmp_path):
    made = trainer(tmp_path, method=Overflows, updates=5, precision="fp16")
    before, skipped = [], []
    for index in range(5):
        before.append(torch.cat([p.detach().flatten() for p in made.roles.parameters("student")]))
        skipped.append(made.step(index)["skipped/student"].item())
    after = [*before[1:], torch.cat([p.detach().flatten() for p in made.roles.parameters("student")])]
    assert skipped == [0, 0, 1, 1, 0]
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [False, False, True, True, False]
    assert made.scalers["student"].get_scale() == 2.0**14


def test_a_resumed_run_in_fp16_is_the_same_run(tmp_path):
    """Its loss scale is part of the checkpoint: without it the step after would not overflow."""
    whole = trainer(tmp_path / "whole", method=Overflows, updates=5, precision="fp16", checkpoint_every=3)
    whole.train()
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoints" / "step-000003").rename(tmp_path / "kept")
    again = trainer(tmp_path / "part", method=Overflows, updates=5, precision="fp16")
    (tmp_path / "part" / "checkpoints").mkdir()
    (tmp_path / "kept").rename(tmp_path / "part" / "checkpoints" / "step-000003")
    again.train(resume=True)
    one, two = (checkpoints.load(checkpoints.latest(tmp_path / name)) for name in ("whole", "part"))
    assert one["scales"]["student.scale"] == 2.0**14
    for name in one:
        for key in one[name]:
            assert torch.equal(one[name][key], two[name][key]), (name, key)


def test_fp16_trains_adapters_in_float32_on_a_float16_network_and_a_float32_codec(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    made = setup(recipe(tiny_teacher, **{"train.precision": "fp16"}), torch.device("cpu"))
    assert made.teacher.network.conv_in.weight.dtype == torch.float16 and made.teacher.codec.dtype == torch.float32
    assert {p.dtype for p in made.roles.parameters("student")} == {torch.float32}
    run = api.train(recipe(tiny_teacher, **{"train.precision": "fp16"}), out=tmp_path / "run")
    saved = checkpoints.load(checkpoints.latest(run))
    moved = [value.abs().max() for key, value in saved["role-student"].items() if "lora_B" in key]
    assert all(torch.isfinite(value) for value in moved) and max(moved) > 0


class Greedy(ToyMethod):
    """Its third step finds no memory."""

    def student_loss(self, batch, step):
        if step.index == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().student_loss(batch, step)


def test_out_of_memory_says_what_was_held_and_keeps_the_last_checkpoint(tmp_path):
    made = trainer(tmp_path, method=Greedy, updates=5, checkpoint_every=2)
    with pytest.raises(Stopped, match=r"out of memory in step 4: held were, with gradients and moments, "
                       r".*critic 0.00 GB.*"
                       r"student 0.00 GB.*step-000002 is kept: resume"):
        made.train()


def test_out_of_memory_says_what_helps(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))

    def fails(self, index):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("stepdistill.training.loop.Trainer.step", fails)
    with pytest.raises(Stopped, match="What helps, cheapest first: train.precision: bf16, "
                       "train.gradient_checkpointing: true, train.accumulate: 4, student: {lora: {rank: 32}}"):
        api.train(recipe(tiny_teacher, student="full"), out=tmp_path / "run")


def card(name: str = "Tesla T4", major: int = 7, minor: int = 5, memory: float = 16e9) -> SimpleNamespace:
    return SimpleNamespace(name=name, major=major, minor=minor, total_memory=memory)


def test_a_card_without_bfloat16_is_refused_by_name(tiny_teacher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card())
    with pytest.raises(RequestError, match="train.precision is bf16, which a Tesla T4 lacks .compute capability 7.5"):
        cards.check_card(recipe(tiny_teacher, **{"train.precision": "bf16"}), torch.device("cuda"))
    cards.check_card(recipe(tiny_teacher, **{"train.precision": "fp16"}), torch.device("cuda"))


@pytest.mark.long
def test_a_card_that_is_too_small_is_refused_with_the_switch_that_makes_it_fit(tiny_teacher, monkeypatch):
    asked = recipe(tiny_teacher, **{"data.batch": 256})
    peaks = [cards.plan(each)["peak"] for each in (asked, *(smaller for *_, smaller in cards.switches(asked)))]
    assert peaks[0] > peaks[1] > peaks[-1]
    monkeypatch.setattr(cards, "ROOM", 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card(memory=peaks[1]))
    with pytest.raises(RequestError, match=f"takes about {peaks[0] / 1e9:.1f} GB .* With train.precision: bf16 "
                       "the peak is about"):
        cards.check_card(asked, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card(memory=1e6))
    with pytest.raises(RequestError, match="Even with train.precision: bf16, train.gradient_checkpointing: true, "
                       "train.accumulate: 256 .*: take a larger card"):
        cards.check_card(asked, torch.device("cuda"))


def test_nothing_is_asked_of_a_cpu_and_no_memory_of_toy(tiny_teacher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card(memory=1))
    cards.check_card(recipe(tiny_teacher), torch.device("cpu"))
    cards.check_card(Recipe.load("toy/lcm"), torch.device("cuda"))


def test_the_codec_of_a_teacher_in_float16_is_refused(tiny_teacher):
    with pytest.raises(RequestError, match="codecs overflow in float16"):
        load_teacher(tiny_teacher, dtype=torch.float16)
