"""What a card must do as the CPU does it, and what only a card can do."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import stepdistill
from stepdistill.diffusion.draws import Step
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run.first_call import check_first_call
from stepdistill.run.setup import setup
from stepdistill.training import checkpoints

METHODS = {"lcm": ("images", 2), "tcd": ("images", 2), "progressive": ("images", 2), "kd": ("pairs", 1),
           # two of each family
           "dmd2": ("images", 2), "sid": ("prompts", 1), "lightning": ("images", 2), "ladd": ("images", 2)}
PAIRS = {"prompts": "shapes", "solver": "ddim", "steps": 4}


def recipe(teacher: Path, method: str, **changes: Any) -> Recipe:
    kind, steps = METHODS[method]
    data = {kind: PAIRS if kind == "pairs" else "shapes", "batch": 4} | ({} if kind == "prompts" else {"count": 16})
    data |= {"cache": True} if kind == "images" else {}
    return Recipe.load({"method": method, "teacher": str(teacher), "student": {"lora": {"rank": 2}}, "guidance": 2.0,
                        "steps": steps,
                        "data": data, "train": {"updates": 3, "log_every": 1}}, changes)


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_draws_are_the_cpus(device):
    ids = torch.arange(1000, 1016)
    here, there = (Step(3, 7, 0.5, "student", 1, ids, where).normal("noise", (4, 64, 64)) for where in (device, "cpu"))
    assert here.device.type == device.type and torch.equal(here.cpu(), there)


def test_a_student_is_sampled_as_on_the_cpu(tiny_teacher, device, exact):
    found = []
    for where in (device, torch.device("cpu")):
        work = setup(recipe(tiny_teacher, "lcm"), where)
        cond = work.teacher.encode(["a red ring", "a blue square"])
        draw = lambda i: Step(0, i, 0.0, "sample", 0, torch.arange(2), where).normal("noise", work.teacher.latent_shape)
        with torch.no_grad():
            found.append(work.method.sampler(work.roles["student"], draw(-1), cond, draw).cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_train(tiny_teacher, tmp_path, device, method, precision):
    updates = 12 if precision == "fp16" else 3         # whose first ones may be left out, while the scale falls
    asked = recipe(tiny_teacher, method, **{"train.precision": precision, "train.updates": updates})
    run = stepdistill.train(asked, out=tmp_path / "run")
    saved = checkpoints.load(checkpoints.latest(run))
    moved = [value.abs().max() for key, value in saved["role-student"].items() if "lora_B" in key]
    assert len(rows(run)) == updates and max(moved) > 0 and all(value.isfinite() for value in moved)


@pytest.mark.parametrize("name", ["shapes/lcm", "shapes/tcd", "shapes-sd3/dmd2"])
def test_the_first_call_of_a_shipped_recipe_lets_it_train(card, name):
    assert check_first_call(setup(Recipe.load(name), card)) < 1e-4


@pytest.mark.parametrize("method", ["lcm", "dmd2"])
def test_losses_are_the_cpus(tiny_teacher, tmp_path, card, exact, method, monkeypatch):
    """The first is computed from the same weights; those after it from weights that AdamW has moved by rounding,
    too."""
    there = stepdistill.train(recipe(tiny_teacher, method), out=tmp_path / "card")
    for module in ("api", "training.loop"):
        monkeypatch.setattr(f"stepdistill.{module}.launched", lambda: torch.device("cpu"))
    here = stepdistill.train(recipe(tiny_teacher, method), out=tmp_path / "cpu")
    for one, two in zip(rows(there)[:1], rows(here)[:1]):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["lcm", "dmd2"])
def test_a_resumed_run_is_the_same_run_to_the_bit(tiny_teacher, tmp_path, device, exact, method, precision):
    asked = recipe(tiny_teacher, method, **{"train.precision": precision, "train.updates": 4,
                                            "train.checkpoint_every": 2, "train.ema": 0.9})
    whole = stepdistill.train(asked, out=tmp_path / "whole")
    part = stepdistill.train(asked, out=tmp_path / "part")
    for file in (part / "checkpoints" / "step-000004").iterdir():
        file.unlink()
    (part / "checkpoints" / "step-000004").rmdir()
    stepdistill.train(asked, out=part, resume=True)
    one, two = (checkpoints.load(checkpoints.latest(run)) for run in (whole, part))
    for name in one:
        for key in one[name]:
            assert torch.equal(one[name][key], two[name][key]), (name, key)


def test_a_student_leaves_as_a_lora_that_stock_diffusers_runs(tiny_teacher, tmp_path, device):
    run = stepdistill.train(recipe(tiny_teacher, "lcm"), out=tmp_path / "run")
    folder = stepdistill.export(run, out=tmp_path / "lora")
    pipeline = load_teacher(tiny_teacher).pipeline()
    call = stepdistill.load(pipeline, folder)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a red ring", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    assert pictures.isfinite().all() and pictures.device.type == device.type


@pytest.mark.parametrize("method", ["lcm", "tcd", "dmd2", "sid", "ladd", "progressive"])
def test_nothing_waits_for_the_card_between_logging_steps(tiny_teacher, tmp_path, card, method, monkeypatch):
    from stepdistill.training.loop import Trainer
    step = Trainer.step

    def strict(self, index):
        if index == 0:                                 # first calls load kernels and choose algorithms
            return step(self, index)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, index)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "step", strict)
    stepdistill.train(recipe(tiny_teacher, method, **{"train.log_every": 3}), out=tmp_path / "run")


@pytest.mark.parametrize("method", ["lcm", "dmd2"])
def test_gradient_checkpointing_changes_nothing(tiny_teacher, tmp_path, device, exact, method):
    runs = [stepdistill.train(recipe(tiny_teacher, method, **{"train.gradient_checkpointing": on}),
                              out=tmp_path / str(on))
            for on in (False, True)]
    for one, two in zip(*map(rows, runs)):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-6)


def test_a_compiled_run_of_the_shipped_teacher_has_the_losses_of_the_eager_one(tmp_path, card, exact):
    runs = [stepdistill.train(recipe(Path("assets/shapes-sd"), "lcm", **{"train.compile": on}), out=tmp_path / str(on))
            for on in (False, True)]
    for one, two in zip(*map(rows, runs)):
        assert one["student/consistency"] == pytest.approx(two["student/consistency"], rel=1e-3)


@pytest.mark.parametrize("backend", ["sdpa", "flash", "xformers"])
def test_attention(tiny_teacher, tmp_path, card, backend):
    try:
        asked = recipe(tiny_teacher, "lcm", **{"train.attention": backend, "train.precision": "bf16"})
        run = stepdistill.train(asked, out=tmp_path / "run")
    except stepdistill.RequestError as refused:
        pytest.skip(f"refused by name: {refused}")
    assert len(rows(run)) == 3
