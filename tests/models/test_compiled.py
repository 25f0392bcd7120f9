"""torch.compile by repeated block: the same run, every state warmed up, and what cannot be compiled."""
from __future__ import annotations

import json

import pytest
import torch

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.models import compiled
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe


def recipe(teacher, method: str, **changes) -> Recipe:
    return Recipe.load({"method": method, "teacher": str(teacher), "student": {"lora": {"rank": 2}},
                        "guidance": 2.0, "steps": 2,
                        "data": {"images": "shapes", "count": 8, "batch": 2, "cache": True},
                        "train": {"updates": 4, "log_every": 1}}, changes)


def losses(run) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [value for row in rows for name, value in row.items() if "/" in name and not name.startswith("grad_norm")]


pytestmark = [pytest.mark.long, pytest.mark.skipif(torch.__version__ < compiled.OLDEST,
                                                   reason=f"blocks are compiled from torch {compiled.OLDEST} on")]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def through(monkeypatch, backend: str) -> None:
    whole = compiled.compile_blocks
    monkeypatch.setattr(api, "compile_blocks", lambda roles: whole(roles, backend))


@pytest.mark.parametrize("method, checkpointing", [("lcm", False), ("lcm", True), ("dmd2", False)])
def test_a_compiled_run_has_the_losses_of_the_eager_one(tiny_teacher, tmp_path, monkeypatch, method, checkpointing):
    through(monkeypatch, "aot_eager")
    asked = {"train.gradient_checkpointing": checkpointing}
    eager = api.train(recipe(tiny_teacher, method, **asked), out=tmp_path / "eager")
    graphs = torch._dynamo.utils.counters["stats"]
    seen = []
    begin = api.Trainer.warm_up
    monkeypatch.setattr(api.Trainer, "warm_up", lambda self: (begin(self), seen.append(graphs["unique_graphs"])))
    fast = api.train(recipe(tiny_teacher, method, **asked, **{"train.compile": True}), out=tmp_path / "fast")
    assert losses(fast) == pytest.approx(losses(eager), rel=1e-5, abs=1e-7)
    assert seen[0] == graphs["unique_graphs"] > 2               # nothing is left to compile once training begins


def test_by_the_inductor_too(tiny_teacher, tmp_path):
    eager = api.train(recipe(tiny_teacher, "lcm"), out=tmp_path / "eager")
    fast = api.train(recipe(tiny_teacher, "lcm", **{"train.compile": True}), out=tmp_path / "fast")
    assert losses(fast) == pytest.approx(losses(eager), rel=1e-5, abs=1e-7)


def test_a_feature_inside_a_compiled_block_is_refused_by_name(tiny_teacher):
    network = load_teacher(tiny_teacher).network
    compiled.check_features(network, ["mid_block", "down_blocks.0"])        # these hold blocks, and are called eagerly
    inside = "down_blocks.0.attentions.0.transformer_blocks.0"
    for name in (inside, f"{inside}.ff"):
        with pytest.raises(RequestError, match=f"the discriminator reads {name}, and {inside}, a "
                           "BasicTransformerBlock, is compiled"):
            compiled.check_features(network, [name])


def test_a_network_without_repeated_blocks_is_refused_with_the_recipes_line(tmp_path):
    with pytest.raises(RequestError, match="train.compile is on, and cannot be: a ToyNetwork names no repeated blocks"):
        api.train(Recipe.load("toy/lcm", {"train.compile": True}), out=tmp_path / "run")
