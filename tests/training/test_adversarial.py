"""A method with a critic and a discriminator, trained as a recipe asks, on a real pipeline of tiny networks."""
from __future__ import annotations

import json
import shutil

import pytest
import torch

from stepdistill import api
from stepdistill.training import Trainer, checkpoints

from ..processes import on_two_processes
from ..unmagnified import unmagnified

ROLES = ("student", "critic", "discriminator", "ema")


def recipe(teacher, **changes):
    made = {"method": "dmd2", "teacher": str(teacher), "student": {"lora": {"rank": 4}},
            "critic": {"lora": {"rank": 2}, "lr": 5e-3},
            "discriminator": {"features": ["up_blocks.0", "mid_block"], "lr": 2e-3}, "guidance": 2.0, "steps": 2,
            "settings": {"critic_steps": 2, "gan_weight": 0.1, "critic_gan_weight": 0.1},
            "data": {"images": "shapes", "batch": 4},
            "train": {"updates": 2, "lr": 1e-3, "warmup": 2, "ema": 0.9, "log_every": 1,
                      "gradient_checkpointing": True},
            "evaluate": {"nfe": [1], "samples": 2}}
    return made | {key: made[key] | value if isinstance(value, dict) else value for key, value in changes.items()}


def states(roles):
    return {name: {key: value.clone() for key, value in roles.state_dict(name).items()} for name in ROLES}


def moved(before, after):
    return {name: [key for key in before[name] if not torch.equal(before[name][key], after[name][key])]
            for name in before}


def test_each_update_moves_its_roles_and_no_other(tiny_teacher, tmp_path, monkeypatch):
    seen, run = [], Trainer.run

    def watched(trainer, update, *rest):
        network = trainer.roles.teacher.network
        before, base = states(trainer.roles), {key: value.clone() for key, value in network.state_dict().items()
                                               if ".lora_" not in key}
        run(trainer, update, *rest)
        changed = moved(before, states(trainer.roles))
        seen.append((update.name, {name: len(keys) / len(before[name]) for name, keys in changed.items() if keys}))
        now = network.state_dict()
        assert all(torch.equal(value, now[key]) for key, value in base.items())
        assert all(p.grad is None for name in ROLES for p in trainer.roles.parameters(name))

    monkeypatch.setattr(Trainer, "run", watched)
    folder = api.train(recipe(tiny_teacher), out=tmp_path / "run")
    assert [name for name, _ in seen] == ["student", *["critic+discriminator"] * 2] * 2
    for name, changed in seen:
        assert changed.keys() == ({"student", "ema"} if name == "student" else {"critic", "discriminator"})
    last = {name: share for _, changed in seen[-3:] for name, share in changed.items()}
    assert last == dict.fromkeys(ROLES, 1.0), "every tensor moves, once every adapter has left zero"

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, share in zip(rows, (0.5, 1.0), strict=True):
        assert (row["lr"], row["lr/critic"], row["lr/discriminator"]) == (share * 1e-3, share * 5e-3, share * 2e-3)
    assert {"student/matching", "student/gan", "critic+discriminator/denoising", "critic+discriminator/discriminator",
            "grad_norm/discriminator"} <= rows[0].keys()
    saved = checkpoints.load(checkpoints.latest(folder))
    assert saved.keys() == {f"role-{name}" for name in ROLES} | {f"optimizer-{name}" for name in ROLES if name != "ema"}
    assert {key.split(".")[1] for key in saved["role-discriminator"]} == {"mid_block", "up_blocks_0"}
    assert api.open_target(folder, "student").guidance == 2.0


@pytest.mark.parametrize("changes",
                         [{"student": "full", "critic": "full"},
                          pytest.param({"train": {"precision": "bf16", "accumulate": 2}}, marks=pytest.mark.long)],
                         ids=["full", "lora bf16"])
def test_a_resumed_run_is_the_same_run(tiny_teacher, tmp_path, changes):
    entries = recipe(tiny_teacher, **changes)
    whole = api.train(entries, out=tmp_path / "whole", **{"train.checkpoint_every": 1})
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints/step-000002")
    api.train(entries, out=part, resume=True, **{"train.checkpoint_every": 1})
    one, two = (checkpoints.load(checkpoints.latest(folder)) for folder in (whole, part))
    assert one.keys() == two.keys() and all(torch.equal(one[name][key], two[name][key]) for name in one
                                            for key in one[name])


WORKER = """
import json
from stepdistill import api
from tests.unmagnified import unmagnified
with unmagnified():
    api.train(json.loads(sys.argv[1]), out="run")
"""


@pytest.mark.long
def test_two_processes_train_what_one_does(tiny_teacher, tmp_path):
    """Adapters of a student and a critic on one base, and heads: what DDP around the whole would refuse at the second
    update."""
    rates = {"train": {"lr": 0.1}, "critic": {"lr": 0.1}, "discriminator": {"lr": 0.1}}
    entries = recipe(tiny_teacher, **rates)
    on_two_processes(WORKER, tmp_path, json.dumps(entries))
    with unmagnified():
        api.train(entries, out=tmp_path / "one")
    one, two = (checkpoints.load(checkpoints.latest(tmp_path / name)) for name in ("one", "run"))
    assert one.keys() == two.keys()
    joined = lambda tensors: torch.cat([tensors[key].flatten().double() for key in sorted(tensors)
                                        if not key.startswith("step.")])
    for name in one:                       # weights, means of gradients, and means of their squares
        off = (joined(two[name]) - joined(one[name])).norm() / joined(one[name]).norm()
        assert off < 1e-4, (name, off)
