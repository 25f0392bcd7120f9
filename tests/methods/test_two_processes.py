"""Methods on two processes, with the real roles: each update's gradients are those of the joined batch, and a run may
move from two processes to one and back.

The networks compute in float64: in float32 the order of sums alone, which is another for another size of batch, moves a
gradient by some 3e-5 of itself. A discriminator's heads are float32 always.
"""
from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stepdistill import parallel
from stepdistill.data.stream import Stream
from stepdistill.diffusion.draws import Step
from stepdistill.diffusion.sampler import Sampler
from stepdistill.models.sharded import shard
from stepdistill.recipe import Recipe
from stepdistill.run.data import dataset
from stepdistill.run.setup import setup
from stepdistill.training import TrainConfig, Trainer, checkpoints, launched

from ..processes import on_two_processes
from ..unmagnified import unmagnified

UPDATES, BATCH = 3, 4
IMAGES = {"images": "shapes", "count": 16, "cache": True, "batch": BATCH}
PROMPTS = {"prompts": ["a red ring", "a blue square", "a green cross"], "batch": BATCH}
LORA = {"lora": {"rank": 2}}
pytestmark = pytest.mark.long      # tests/training: test_parallel.py and test_adversarial.py hold the same in seconds
CASES = {
    "lcm": {"method": "lcm", "guidance": [2.0, 4.0], "data": IMAGES},
    "dmd2": {"method": "dmd2", "guidance": 2.0, "data": PROMPTS, "critic": LORA,
             "settings": {"critic_steps": 2, "gan_weight": 0.0}},
    "dmd2-gan": {"method": "dmd2", "guidance": 2.0, "data": IMAGES, "critic": LORA,
                 "settings": {"critic_steps": 2, "gan_weight": 0.1}},
}
# that updates train
ROLES = {"lcm": ("student",), "dmd2": ("student", "critic"), "dmd2-gan": ("student", "critic", "discriminator")}
CLOSE = {"lcm": 1e-9, "dmd2": 1e-9, "dmd2-gan": 1e-5}
CASES |= {f"{name}-fsdp": {**CASES[name], "train": {"fsdp": True}} for name in ("lcm", "dmd2-gan")}
ROLES |= {f"{name}-fsdp": roles for name, roles in ROLES.items()}
CLOSE |= {f"{name}-fsdp": limit for name, limit in CLOSE.items()}
WORKER = """
from pathlib import Path
from tests.methods.test_two_processes import CASES, train
for name in CASES:
    train(name, Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), accumulate=2)
"""


class StopForward(Exception):
    pass


def train(name: str, folder: Path, teacher: str, until: int, accumulate: int = 1) -> None:
    """Goes on with the run folder/name to step `until`, and writes down what every update trained on."""
    table = {"teacher": teacher, "student": LORA, "steps": 2, **CASES[name]}
    work = setup(Recipe.load(table | {"train": {"updates": UPDATES, "ema": 0.5, **table.get("train", {})}}), launched())
    work.teacher.network.double()
    stream = Stream(dataset(work), BATCH, seed=3, shape=work.teacher.latent_shape)

    if work.recipe.train.fsdp:
        shard(work.roles)
        if parallel.world_size() == 2:
            held = {name: p for name, p in work.teacher.network.named_parameters() if ".lora_" not in name}
            assert all(isinstance(p, DTensor) for p in held.values())
            assert sum(p.to_local().numel() for p in held.values()) < 0.55 * sum(p.numel() for p in held.values())

    def stop(step: int) -> None:
        if step == until:
            raise StopForward

    config = TrainConfig(updates=UPDATES, lr=0.1, accumulate=accumulate, clip=None, checkpoint_every=1, seed=3)
    with unmagnified():
        trainer = Trainer(work.method, work.roles, stream, config, folder / name, [stop])
    with pytest.MonkeyPatch.context() as patch, suppress(StopForward):
        seen = {"gradients": gradients(trainer), "exits": exits(trainer, patch)}
        # a network answers in the precision of the state that it is asked about
        normal = Step.normal
        patch.setattr(Step, "normal", lambda self, name, shape: normal(self, name, shape).double())
        trainer.train(resume=True)
    torch.save(seen, folder / f"{name}-{until}-{parallel.rank()}.pt")


def gradients(trainer: Trainer) -> dict[tuple[int, str, int], Tensor]:
    """(step, role, number within the step) -> all gradients that AdamW is about to use, after averaging over ranks."""
    found, counts = {}, Counter()

    def note(role: str) -> None:
        found[trainer.done, role, counts[trainer.done, role]] = torch.cat([
            p.grad.flatten().clone() for p in trainer.optimizers[role].parameters if p.grad is not None])
        counts[trainer.done, role] += 1

    for role, optimizer in trainer.optimizers.items():
        optimizer.adamw.register_step_pre_hook(lambda *_, role=role: note(role))
    return found


def exits(trainer: Trainer, patch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(step, the evaluation at which a rollout was left), of every rollout."""
    found, simulate = [], Sampler.simulate

    def noted(self, role, noise, exit, *more):
        found.append((trainer.done, exit))
        return simulate(self, role, noise, exit, *more)

    patch.setattr(Sampler, "simulate", noted)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_teacher) -> Path:
    """whole: one process, three steps. moved: the first step on two processes, the second on one, the third on two."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("whole", "moved"):
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPDISTILL_CACHE", str(folder / "cache"))
        on_two_processes(WORKER, folder, folder / "moved", tiny_teacher, 1)
        for name in CASES:
            train(name, folder / "moved", str(tiny_teacher), 2)
            train(name, folder / "whole", str(tiny_teacher), UPDATES)
        on_two_processes(WORKER, folder, folder / "moved", tiny_teacher, UPDATES)
    return folder


def seen(runs: Path, name: str, until: int, rank: int = 0):
    return torch.load(runs / f"{name}-{until}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_every_update_s_gradients_are_those_of_the_joined_batch(runs, name):
    whole, moved = seen(runs / "whole", name, UPDATES)["gradients"], {}
    for until in (1, 3):
        first, second = (seen(runs / "moved", name, until, rank)["gradients"] for rank in (0, 1))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        moved |= first
    assert {role for _, role, _ in whole} == set(ROLES[name])
    assert moved.keys() == {key for key in whole if key[0] != 1}
    for key, gradient in moved.items():
        assert gradient.norm() > 0 and (gradient - whole[key]).norm() <= CLOSE[name] * whole[key].norm(), key


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("lcm")])
def test_rollouts_end_at_the_same_step_everywhere(runs, name):
    whole, moved = seen(runs / "whole", name, UPDATES)["exits"], seen(runs / "moved", name, 2)["exits"]
    assert {exit for _, exit in whole} == {0, 1}
    for until in (1, 3):
        first, second = (seen(runs / "moved", name, until, rank)["exits"] for rank in (0, 1))
        assert first == second and first[::2] == first[1::2]                  # two micro-batches each
        moved = moved + first[::2]
    assert sorted(moved, key=lambda pair: pair[0]) == whole


@pytest.mark.parametrize("name", CASES)
def test_a_run_moves_from_two_processes_to_one_and_back(runs, name):
    whole, moved = (checkpoints.load(checkpoints.latest(runs / kind / name)) for kind in ("whole", "moved"))
    assert whole.keys() == moved.keys() >= {"role-student", "role-ema", "optimizer-student"}
    begun = checkpoints.load(runs / "whole" / name / "checkpoints/step-000001")
    for part in whole:
        for key, tensor in whole[part].items():
            torch.testing.assert_close(moved[part][key], tensor, rtol=0, atol=CLOSE[name],
                                       msg=lambda message: f"{part} {key}: {message}")
        assert any(not torch.allclose(tensor, begun[part][key], atol=1e-4) for key, tensor in whole[part].items())
