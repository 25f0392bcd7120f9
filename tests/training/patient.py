"""A small run with a doctor: a student of pictures of 4 x 4 in two channels, which learns to give what it is shown."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stepdistill.diffusion.contracts import Batch, Condition
from stepdistill.diffusion.draws import fractions, key
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.methods.base import Frozen, Inference, Method, Trained, Update
from stepdistill.training import TrainConfig, Trainer
from stepdistill.training.doctor import Doctor, Orders, Patient

from .toy import ToyRoles

SHAPE, PROMPTS, EACH, SIZE = (2, 4, 4), 4, 4, 32
# noise (B, ...), label (B,), progress -> what the student is to give
Taught = Callable[[Tensor, Tensor, float], Tensor]


def right(noise: Tensor, label: Tensor, progress: float = 0.0) -> Tensor:
    """What the teacher gives: the noise, scaled, on a pattern of the prompt's own."""
    return 0.6 * noise + patterns()[label]


def patterns() -> Tensor:
    return torch.randn(PROMPTS, *SHAPE, generator=torch.Generator().manual_seed(1))


class Student(nn.Module):
    """Knows something of the prompts, and nothing of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.told = nn.Linear(SIZE, SIZE), nn.Embedding.from_pretrained(0.5 * patterns().flatten(1),
                                                                                  freeze=False)

    def forward(self, noise: Tensor, label: Tensor) -> Tensor:
        return (self.own(noise.flatten(1)) + self.told(label)).reshape(noise.shape)


class Showing(Method):
    """settings["taught"]: what the student is shown."""

    Settings = dict
    data = ("prompts",)

    @classmethod
    def needs(cls, settings, full):
        return {"teacher": Frozen(), "student": Trained()}

    @classmethod
    def inference(cls, settings, steps, schedule, guidance=1.0):
        return Inference(steps)

    def updates(self):
        return [Update(("student",), self.student_loss)]

    def student_loss(self, batch, step):
        noise, label = step.normal("noise", SHAPE), batch.cond.label
        aim = self.settings["taught"](noise, label, step.progress)
        return {"match": (self.roles["student"](noise, label) - aim).square().mean()}


class Labels:
    def batch(self, step, update, repeat=0, rank=0, world=1, micro=0, micros=1):
        ids = step * 64 + torch.arange(64)
        return Batch(ids, Condition(label=(fractions(key("label"), ids, 1)[:, 0] * PROMPTS).long()), shape=SHAPE)


class Base:
    schedule = RectifiedFlow()

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, x_t, t, cond=None):
        return Prediction(self.network(x_t.flatten(1)).reshape(x_t.shape), x_t, t, self.schedule, "x0")


def small_run(folder: Path, taught: Taught = right, then: str = "warn", facts: dict | None = None,
              bands: dict | None = None, updates: int = 60,
              every: int = 4, **config) -> tuple[Trainer, Doctor]:
    """A trainer that has a doctor. Its teacher is `right`, its base a network that nobody is to touch."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    roles = ToyRoles({"teacher": nn.Linear(SIZE, SIZE), "student": Student()}, {})
    roles["teacher"].requires_grad_(False)
    config = TrainConfig(**{"updates": updates, "lr": 2e-2, "log_every": every, "weight_decay": 0.0} | config)
    trainer = Trainer(Showing({"taught": taught}, roles, 1.0, None), roles, Labels(), config, folder)
    label = torch.arange(PROMPTS).repeat_interleave(EACH)
    noise = torch.randn(EACH, *SHAPE, generator=torch.Generator().manual_seed(2)).repeat(PROMPTS, 1, 1, 1)
    patient = Patient(PROMPTS, noise, Condition(label=label), sample=lambda: roles["student"](noise, label).detach(),
                      teacher=lambda: right(noise, label),
                      base=Base(roles["teacher"]), frozen=list(roles["teacher"].parameters()))
    orders = Orders(every, then, bands or {}, {"updates": updates, "guidance": 1.0, "train.lr": config.lr}
                    | (facts or {}))
    doctor = Doctor(trainer, patient, orders)
    trainer.hear(doctor, doctor.start)
    return trainer, doctor


def with_patient(doctor: Doctor, **changes) -> None:
    doctor.patient = replace(doctor.patient, **changes)
