"""AdamW with moments of 8 bits: its steps, its checkpoints, and where bitsandbytes, an extra, is missing."""
from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from torch.amp import GradScaler

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.recipe import Recipe
from stepdistill.run import checks
from stepdistill.training import checkpoints
from stepdistill.training.optimizers import RoleOptimizer, TrainConfig

eight_bits = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install stepdistill[bitsandbytes]")


def stepped(config: TrainConfig, steps: int = 12, saved_at: int | None = None) -> list[torch.Tensor]:
    """Weights after these steps down a bowl, whose second one is too small for 8 bits; saved and loaded after one of
    them."""
    weights = [torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
               for i, shape in enumerate([(64, 128), (5,)])]
    optimizer, scaler = RoleOptimizer(weights, config), GradScaler("cpu", enabled=False)
    for i in range(steps):
        sum((w * w).sum() * (1 + 0.3 * i) for w in weights).backward()
        optimizer.step(1e-2, scaler)
        if i == saved_at:
            state = {key: tensor.clone() for key, tensor in optimizer.state().items()}
            optimizer = RoleOptimizer(weights, config)
            optimizer.load(state)
    return [w.detach() for w in weights]


@eight_bits
def test_8_bits_step_as_32_do():
    whole, eight = (stepped(TrainConfig(updates=1, optimizer=name, clip=None)) for name in ("adamw", "adamw8bit"))
    # below 4096 numbers they are float32
    torch.testing.assert_close(eight[1], whole[1], rtol=1e-5, atol=1e-6)
    assert 0 < (eight[0] - whole[0]).abs().max() < 0.02


@pytest.mark.parametrize("name", ["adamw", pytest.param("adamw8bit", marks=eight_bits)])
def test_a_saved_optimizer_goes_on_as_if_it_had_not_been(name):
    config = TrainConfig(updates=1, optimizer=name, clip=None)
    for again, once in zip(stepped(config, saved_at=5), stepped(config)):
        assert torch.equal(again, once)


def recipe(teacher, **train) -> dict:
    return {"method": "lcm", "teacher": str(teacher), "student": {"lora": {"rank": 2}}, "steps": 2, "guidance": 3.0,
            "data": {"images": "shapes", "count": 8, "batch": 2},
            "train": {"optimizer": "adamw8bit", "log_every": 1, **train}}


@eight_bits
def test_a_run_resumes_bit_for_bit(tiny_teacher, tmp_path):
    api.train(recipe(tiny_teacher, updates=4, checkpoint_every=2), out=tmp_path / "whole")
    last = checkpoints.latest(tmp_path / "whole")
    found = checkpoints.load(last)
    assert (found["optimizer-student"]["__bnb_optimizer_quant_state__.state1.0"].numel()
            and found["optimizer-student"]["step.0"] == 4)
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    api.train(recipe(tiny_teacher, updates=4, checkpoint_every=2), out=tmp_path / "whole", resume=True)
    again = checkpoints.load(checkpoints.latest(tmp_path / "whole"))
    assert all(torch.equal(again[part][key], found[part][key]) for part in found for key in found[part])
    losses = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses] == [1, 2, 3, 4]


def test_without_bitsandbytes_it_is_refused_before_anything_is_loaded(tiny_teacher, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"train.optimizer is adamw8bit, which wants bitsandbytes, .* "
                       r"stepdistill\[bitsandbytes\]"):
        checks.check(Recipe.load(recipe(tiny_teacher, updates=1)))
