"""SwiftBrush. Nguyen & Tran 2023, arXiv:2312.05239, algorithm 1: variational score distillation of a one-step network.

    student  <- x + (real score - fake score), teacher and critic guided alike
    critic   <- denoise the same sample, its prompt dropped now and then

Because both are guided, a student that draws as the unguided teacher does is a fixed point at any scale. At first the
critic is the teacher, and the gradient is zero: it begins once the critic has moved, which therefore wants the higher
rate. Source of the defaults: (r) the released training of SD 2.1: guidance 4.5, student 1e-6, critic's LoRA 1e-3 at
rank 64.
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
    noise_law: NoiseLaw = "uniform"    # of the levels at which scores are matched and the critic is trained: uniform,
                                       # lognormal, shifted, mixture (r)
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those at which the scores are matched (r)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1
    start_time: float | None = None    # at which the student begins, with unit noise; None: t = 1 (r)
    drop: float = 0.1                  # share of prompts that the critic does not see, so that it can be guided (r)

    def __post_init__(self) -> None:
        check_noise(self)


class SwiftBrush(Method):
    Settings = Settings
    data = ("prompts", "images", "samples")

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
            raise ValueError(f"swiftbrush makes one-step students, found {steps} steps: dmd2 makes few-step ones")
        return renoising(settings, steps)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.student_loss), Update(("critic",), self.critic_loss, shares=1)]

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        step.kept["sample"] = x.detach()
        t, w = self.matched(step.uniform("t")), drawn(self.guidance, step)
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, step.normal("noise", batch.shape), t)
            real, fake = (guided(role, w)(x_t, t, batch.cond).x0 for role in (self.teacher, self.critic))
        # sigma_t^2 on the difference in eps, which is alpha_t sigma_t on that in x_0
        return {"matching": distribution_matching(x, real, fake,
                                                  self.schedule.alpha(t) * self.schedule.sigma(t)).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        x, eps, t = step.kept["sample"], step.normal("noise", batch.shape), self.trained(step.uniform("t"))
        cond = batch.cond.dropped(step.uniform("drop") < self.settings.drop) if self.settings.drop else batch.cond
        error = squared(self.critic(self.schedule.add_noise(x, eps, t), t, cond).eps, eps)
        return {"denoising": (like(self.schedule.alpha(t), error) ** 2 * error).mean()}
