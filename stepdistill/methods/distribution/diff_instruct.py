"""Diff-Instruct. Luo et al. 2023, arXiv:2305.18455, algorithm 1: the integral KL divergence over all noise levels.

    critic   <- denoise the student's samples, weighted as EDM does
    student  <- x + (real score - fake score), at noise levels of the same law

Source of the defaults: (r) the released training on EDM teachers. It sums the gradient over pixels where the mean is
taken
here: Adam does not see the difference, a clipped gradient norm does.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.rollout import rollout
from ...diffusion.schedule import Schedule, like
from ...diffusion.times import NoiseLaw
from ...diffusion.weighting import edm
from ...losses.matching import distribution_matching
from ...losses.regression import squared
from ..base import (
    Frozen,
    Guidance,
    Inference,
    Losses,
    Method,
    Need,
    Trained,
    Update,
    check_noise,
    noise_levels,
    renoising,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    noise_law: NoiseLaw = "lognormal"  # of the levels at which student and critic are trained: uniform, lognormal,
                                       # shifted, mixture (r)
    t_range: tuple[float, float] = (0.0, 1.0)      # of these, those of both (r)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture (r)
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture (r)
    shift: float = 3.0                 # of shifted: towards noise above 1
    start_time: float | None = None    # at which the student begins, with unit noise; None: t = 1 (r: a sigma of 1)
    sigma_data: float = 1.0            # deviation of the data: 1 for scaled latents (r: 0.5, for pixels in [-1, 1])

    def __post_init__(self) -> None:
        check_noise(self)
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data must be above 0; found {self.sigma_data}")


class DiffInstruct(Method):
    Settings = Settings
    data = ("prompts", "images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.schedule = self.teacher.schedule
        self.level = noise_levels(settings, self.schedule)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps != 1:
            raise ValueError(f"diff_instruct makes one-step students, found {steps} steps: dmd2 makes few-step ones")
        return renoising(settings, steps)

    def updates(self) -> list[Update]:
        return [Update(("critic",), self.critic_loss), Update(("student",), self.student_loss)]

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        with torch.no_grad():
            x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        t = self.level(step.uniform("t"))
        x_t = self.schedule.add_noise(x, step.normal("noise", batch.shape), t)
        error = squared(self.critic(x_t, t, batch.cond).x0, x)
        return {"denoising": (like(edm(self.schedule, t, self.settings.sigma_data), error) * error).mean()}

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        t = self.level(step.uniform("t"))
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, step.normal("noise", batch.shape), t)
            real = guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond).x0
            fake = self.critic(x_t, t, batch.cond).x0
        return {"matching": distribution_matching(x, real, fake, torch.ones_like(t)).mean()}
