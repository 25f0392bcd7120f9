"""DMD: Distribution Matching Distillation. Yin et al. 2023, arXiv:2311.18828, algorithm 1: a one-step network.

    x        <- the student's sample of fresh noise
    student  <- x + (real score - fake score), of one size at all noise levels           (algorithm 2)
                and, of a pair's noise, as near as it can be to the picture that the teacher made of it
    critic   <- denoise the same x

The scores alone let modes go; the pairs, made with the same guidance, hold on to them. The paper measures their
distance in pixels with LPIPS, at a weight of 0.25 to the end. Here it is the mean squared one of the latents, which
needs neither decoder nor features (Kang et al. 2024, arXiv:2405.05967, regress in latents too): it pulls hardest where
the layout is wrong. Its own zero is a soft picture, the mean of all that the student cannot tell apart, so that its
weight and its fading are ours: modes are held while the student finds them, and the scores alone have the last word.
Sources of the defaults: (p) the paper. Its weight as printed, eq. 8, holds an alpha_t more than its algorithm 2, which
is followed.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.rollout import rollout
from ...diffusion.schedule import Schedule
from ...diffusion.times import NoiseLaw
from ...diffusion.weighting import dmd
from ...losses.matching import denoising, distribution_matching
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
    # A latent that is wholly wrong, about sqrt(2) away, then pulls with 2 sqrt(2) / 4 = 0.7, and the scores with about
    # 1.
    regression_weight: float = 0.25    # of the pairs; the paper's 0.25 is one of LPIPS
    regression_end: float | None = 1.0    # share of the training at which their weight has faded to 0, evenly; None: it
                                          # stays (p)
    start_time: float | None = None    # at which the student begins, with unit noise; None: t = 1 (p)
    noise_law: NoiseLaw = "uniform"    # of the levels at which scores are matched and the critic is trained: uniform,
                                       # lognormal, shifted, mixture (p)
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those at which the scores are matched (p)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1

    def __post_init__(self) -> None:
        check_noise(self)
        if self.regression_weight < 0:
            raise ValueError(f"regression_weight must not be negative; found {self.regression_weight}")
        if self.regression_end is not None and not 0 < self.regression_end <= 1:
            raise ValueError("regression_end must be a share of the training, above 0 and up to 1, or null; found "
                             f"{self.regression_end}")


class DMD(Method):
    Settings = Settings
    data = ("pairs",)

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.schedule = self.teacher.schedule
        self.matched, self.trained = (noise_levels(settings, self.teacher.schedule, whole) for whole in (False, True))

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps != 1:
            raise ValueError(f"dmd makes one-step students, found {steps} steps: dmd2 makes few-step ones")
        return renoising(settings, steps)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.student_loss), Update(("critic",), self.critic_loss, shares=1)]

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        step.kept["sample"] = x.detach()
        t = self.matched(step.uniform("t"))
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, step.normal("noise", batch.shape), t)
            real = guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond).x0
            fake = self.critic(x_t, t, batch.cond).x0
        again = self.sampler(self.student, batch.pairs.noise, batch.cond)
        return {"matching": distribution_matching(x, real, fake, dmd(x.detach(), real)).mean(),
                "regression": self.weight(step) * squared(again, batch.pairs.nodes[:, -1]).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        x, eps, t = step.kept["sample"], step.normal("noise", batch.shape), self.trained(step.uniform("t"))
        return {"denoising": denoising(self.critic(self.schedule.add_noise(x, eps, t), t, batch.cond), x, eps).mean()}

    def weight(self, step: Step) -> float:
        """Of the pairs."""
        end = self.settings.regression_end
        return self.settings.regression_weight * (1.0 if end is None else max(0.0, 1 - step.progress / end))
