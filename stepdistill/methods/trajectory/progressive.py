"""Progressive Distillation. Salimans & Ho 2022, arXiv:2202.00512, algorithm 2.

    t      <- a time of the student's own sampler, r <- the time where its step lands, m <- the one between, of twice
    the steps
    x_t    <- noise the data to t
    x_m    <- one DDIM step of the guided teacher from x_t
    x_r    <- one more from there
    target <- the x_0 whose single DDIM step from x_t lands on x_r
    loss   =  max(SNR, 1) | student(x_t, t) - target |^2

The student of each stage is the teacher of the next, which has half its steps: stages in the recipe, such as
{steps: 8} and {steps: [4, 2], teacher: previous}. The first teacher is guided, later ones have that within. The
published rule for the last step, to take the x_0 that the teacher predicts at m, is what the target is where r = 0 is
clean data.

Sources of the defaults: (p) the paper, (r) its released training.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.bridges import two_in_one
from ...diffusion.contracts import Batch, Condition
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided, with_scale
from ...diffusion.schedule import Schedule, like
from ...diffusion.weighting import snr_plus_one, truncated_snr
from ...losses.regression import squared
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check_halving, halving, middle


@dataclass(frozen=True, kw_only=True)
class Settings:
    weight: Literal["truncated", "v"] = "truncated"   # of the error in x_0: max(SNR, 1), or SNR + 1 (p, r: truncated
                                                      # for CIFAR-10)
    guidance_embedding: bool = False   # the student reads the guidance scale; it must where it begins as a student that
                                       # does

    def __post_init__(self) -> None:
        if self.weight not in ("truncated", "v"):
            raise ValueError(f"weight must be 'truncated' or 'v'; found {self.weight!r}")


class Progressive(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = roles["teacher"], roles["student"]
        self.schedule = self.student.schedule
        self.grid = sampler.doubled(self.schedule)
        self.weight = {"truncated": truncated_snr, "v": snr_plus_one}[settings.weight]

    @classmethod
    def succession(cls, steps: int, before: int) -> str | None:
        return halving("progressive", steps, before)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher", reads=("w",) * settings.guidance_embedding)}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        check_halving("progressive", steps, schedule)
        return Inference(steps, guidance=middle(guidance) if settings.guidance_embedding else None, exact_grid=False)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        i, w = step.integers("step", self.sampler.nfe), drawn(self.guidance, step)
        t, m, r = (self.grid[2 * i + j] for j in range(3))
        x_t = self.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            target = self.target(x_t, t, m, r, batch.cond, w)
        error = squared(self.student(x_t, t, with_scale(batch.cond, w) if self.settings.guidance_embedding
                                     else batch.cond).x0, target)
        return {"progressive": (like(self.weight(self.schedule, t), error) * error).mean()}

    def target(self, x_t: Tensor, t: Tensor, m: Tensor, r: Tensor, cond: Condition, w: float | Tensor) -> Tensor:
        """The x_0 that takes x_t at t to r in one step as the teacher goes there in two, by m. Times (B,),
        descending."""
        return two_in_one(guided(self.teacher, w), x_t, t, m, r, cond)
