"""A method of two roles on small networks with dropout: all that the loop has to get right, in milliseconds."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from stepdistill.diffusion.contracts import Batch, Condition
from stepdistill.diffusion.draws import key
from stepdistill.methods.base import Follows, Frozen, Inference, Method, Trained, Update
from stepdistill.training import TrainConfig, Trainer

DIM = 6


class ToyRoles(dict):
    """Modules by name, with the interface that training asks of roles."""

    def __init__(self, networks: dict[str, nn.Module], follows: dict[str, Follows]) -> None:
        super().__init__(networks)
        self.follows, self.followed = follows, []

    @property
    def names(self): return tuple(self)
    def parameters(self, name): return [] if name == "teacher" else list(self[name].parameters())
    def state_dict(self, name): return dict(self[name].state_dict())
    def load_state_dict(self, name, state): self[name].load_state_dict(state)

    @torch.no_grad()
    def follow(self, leader, step):
        self.followed.append(leader)
        for name, need in self.follows.items():
            if need.leader == leader:
                torch._foreach_lerp_(self.parameters(name), self.parameters(leader), 1 - need.decay)


class ToyMethod(Method):
    """A critic, twice a step, on every second step; then a student that imitates the teacher and pleases the critic."""

    Settings = dict
    data = ("images",)

    @classmethod
    def needs(cls, settings, full):
        return {"teacher": Frozen(), "student": Trained(), "critic": Trained(), "ema": Follows("student", 0.9)}

    @classmethod
    def inference(cls, settings, steps, schedule, guidance=1.0):
        return Inference(steps)

    def updates(self):
        return [Update(("critic",), self.critic_loss, every=2, repeat=2), Update(("student",), self.student_loss)]

    def critic_loss(self, batch, step):
        return {"fit": (self.roles["critic"](batch.x0) - step.normal("target", (DIM,))).square().mean()}

    def student_loss(self, batch, step):
        with torch.no_grad():
            wanted = self.roles["teacher"](batch.x0)
        x0 = self.roles["student"](batch.x0 + 0.1 * step.normal("noise", (DIM,)))
        return {"match": (x0 - wanted).square().mean(), "critic": 0.1 * self.roles["critic"](x0).square().mean()}


class ToyStream:
    """Normal samples, each a function of its id."""

    def __init__(self, global_batch: int = 8) -> None:
        self.global_batch, self.asked = global_batch, []

    def batch(self, step, update, repeat=0, rank=0, world=1, micro=0, micros=1):
        self.asked.append((step, update, repeat, rank, world, micro, micros))
        size = self.global_batch // (world * micros)
        ids = step * self.global_batch + (rank * micros + micro) * size + torch.arange(size)
        draw = lambda i: torch.randn(DIM, generator=torch.Generator().manual_seed(key(update, repeat, i)))
        return Batch(ids, Condition(), torch.stack([draw(i) for i in ids.tolist()]))


def toy_roles(dropout: float = 0.0) -> ToyRoles:
    torch.manual_seed(0)
    network = lambda: nn.Sequential(nn.Linear(DIM, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, DIM))
    networks = {"teacher": network(), "student": network(), "critic": network(), "ema": network()}
    networks["ema"].load_state_dict(networks["student"].state_dict())
    networks["teacher"].requires_grad_(False)
    return ToyRoles(networks, {"ema": Follows("student", 0.9)})


def trainer(run_dir: Path, on_step: Sequence[Callable[[int], None]] = (),
            on_start: Sequence[Callable[[int], None]] = (), dropout: float = 0.0, roles: ToyRoles | None = None,
            method: type[Method] = ToyMethod, **config) -> Trainer:
    roles = toy_roles(dropout) if roles is None else roles
    config = TrainConfig(**{"updates": 7, "lr": 1e-2, "log_every": 3, "seed": 5} | config)
    return Trainer(method({}, roles, 1.0, 1), roles, ToyStream(), config, run_dir, on_step, on_start)
