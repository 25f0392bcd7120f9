"""f-distill: One-step Diffusion Models with f-Divergence Distribution Matching. Xu et al. 2025, arXiv:2502.15681,
algorithm 1.

    x               <- the student's own sample, at a random step of its sampler
    r               <- exp( discriminator ) at the noised x: teacher's density over the student's
    student         <- x + h(r) / h(1) (real score - fake score), fool the discriminator
    repeat critic_steps times
        critic         <- denoise the student's samples
        discriminator  <- tell noised real from noised fake, on the frozen teacher's features

DMD2's step times a weight that says how much more probable a sample is under the teacher: h is 1 of the reverse KL,
which is DMD2, and grows with r for divergences that cover modes. The released code divides h by its mean over the
batch; here it is divided by h(1), which asks no other sample.

Sources of the defaults: (c) the authors' released training (ImageNet 64), (d) DMD2's.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.rollout import rollout
from ...diffusion.schedule import Schedule
from ...diffusion.times import NoiseLaw
from ...diffusion.weighting import dmd
from ...losses.adversarial import discriminator_loss, generator_loss
from ...losses.divergence import DIVERGENCES, DivergenceName, ratio, relative_weight
from ...losses.matching import denoising, distribution_matching
from ..base import (
    Frozen,
    Guidance,
    Heads,
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
    divergence: DivergenceName = "js"  # reverse_kl is DMD2's; forward_kl, js, softened_rkl, hellinger, jeffreys (c)
    critic_steps: int = 5              # critic updates a step (d)
    share_rollout: bool = False        # all of them on the student's own sample: cheaper, another estimator
    noise_law: NoiseLaw = "uniform"    # of the levels at which scores are matched and the critic is trained: uniform,
                                       # lognormal, shifted, mixture (d)
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those at which the scores are matched (d)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1
    start_time: float | None = None    # at which a one-step student begins, with unit noise; None: t = 1
    gan_weight: float = 3e-3           # of fooling the discriminator; 0: it is asked for the ratio alone (c)

    def __post_init__(self) -> None:
        check_noise(self)
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; found {self.divergence!r}")


class FDistill(Method):
    Settings = Settings
    data = ("images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.discriminator = roles["discriminator"]
        self.matched, self.trained = (noise_levels(settings, self.teacher.schedule, whole) for whole in (False, True))

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher"),
                "discriminator": Heads("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return renoising(settings, steps)

    def updates(self) -> list[Update]:
        steps = self.settings.critic_steps
        return [Update(("student",), self.student_loss),
                Update(("critic", "discriminator"), self.critic_loss, repeat=steps, shares=steps
                       if self.settings.share_rollout else 1)]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        step.kept["sample"] = x.detach()
        t = self.matched(step.uniform("t"))
        x_t = self.teacher.schedule.add_noise(x, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            real = guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond).x0
            fake = self.critic(x_t, t, batch.cond).x0
        logits = self.discriminator(x_t, t, batch.cond)
        weight = dmd(x.detach(), real) * relative_weight(self.settings.divergence, ratio(logits.detach()))
        losses = {"matching": distribution_matching(x, real, fake, weight).mean()}
        return losses | ({"gan": self.settings.gan_weight * generator_loss(logits).mean()}
                         if self.settings.gan_weight else {})

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        x = self.sample(batch, step)
        t, eps = self.trained(step.uniform("t")), step.normal("noise", batch.shape)
        x_t = self.critic.schedule.add_noise(x, eps, t)
        real_t = self.trained(step.uniform("real t"))
        real = self.critic.schedule.add_noise(batch.x0, step.normal("real noise", batch.shape), real_t)
        separation = discriminator_loss(self.discriminator(real, real_t, batch.cond),
                                        self.discriminator(x_t, t, batch.cond))
        return {"denoising": denoising(self.critic(x_t, t, batch.cond), x, eps).mean(),
                "discriminator": separation.mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, batch: Batch, step: Step) -> Tensor:
        """The sample that the student was just trained on, where the batch is shared, or a new one."""
        if "sample" in step.kept:
            return step.kept["sample"]
        return rollout(self.sampler, self.student, batch.cond, step, batch.shape)
