"""Uni-Instruct. Wang et al. 2025, arXiv:2505.20755: the divergence of f, integrated over all noise levels.

    x        <- the student's own sample
    critic   <- denoise x, and tell data from it, noised alike, by heads on its features
    x        <- another, r = exp( heads ) at x_t: teacher's density over the student's
    student  <- descend h(r) [ (1 - alpha) |d|^2 + <d, f_psi - x> ] / h(1), alpha = (1 + r h'(r) / h(r)) / 2
                d = f_phi - f_psi, through all three networks; and be taken for data

The integral of D_f over diffusion times is that of g^2 / 2 E h(r) |s_phi - s_psi|^2, a Fisher divergence weighted by
h(r) = r^2 f''(r). This loss has its exact gradient: of samples by d, f_psi and r, and of their law by the second
product. The reverse KL, alpha = 1/2, is then SiD's Fisher divergence; the forward KL, alpha = 1, is r times the score
identity with the law held fixed, all that the released code has. That code reads r off a loss of the heads that is
divided by a norm already; here r is what the heads say.

Sources of the defaults: (r) the released training, (i) that of f-distill, for the bounds of r, (o) ours.
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
from ...losses.divergence import DIVERGENCES, DivergenceName, elasticity, ratio, relative_weight
from ...losses.matching import denoising, score_identity
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
    divergence: DivergenceName = "js"  # reverse_kl is SiD at alpha 1/2; forward_kl, softened_rkl, hellinger, jeffreys
                                       # (r: js and the forward and reverse KL)
    critic_steps: int = 1              # critic updates a step (r)
    ratio_start: int = 390             # updates of the student before r is read; it counts as 1 (r: after 100,000
                                       # images, 256 a batch)
    gan_weight: float = 1e-2           # of being taken for data; 0: the heads are asked for the ratio alone (o; r: 0.01
                                       # beside 100 of the identity, both sums, and over the same mean distance)
    critic_gan_weight: float = 1.0     # of telling data from samples, in the critic's update (o; r: 1/2 beside a sum
                                       # over the numbers of a sample, both under EDM's weight)
    start_time: float | None = None    # at which a one-step student begins, with unit noise; None: t = 1 (r: a sigma of
                                       # 2.5)
    noise_law: NoiseLaw = "uniform"    # of the levels at which student and critic are trained: uniform, lognormal,
                                       # shifted, mixture
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those of both
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1

    def __post_init__(self) -> None:
        check_noise(self)
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; found {self.divergence!r}")
        if self.ratio_start < 0:
            raise ValueError(f"ratio_start must be at least 0; found {self.ratio_start}")


class UniInstruct(Method):
    Settings = Settings
    data = ("images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.discriminator, self.schedule = roles["discriminator"], self.teacher.schedule
        self.level = noise_levels(settings, self.schedule)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher"),
                "discriminator": Heads("critic")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return renoising(settings, steps)

    def updates(self) -> list[Update]:
        return [Update(("critic", "discriminator"), self.critic_loss, repeat=self.settings.critic_steps),
                Update(("student",), self.student_loss)]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        with torch.no_grad():
            x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        t, eps = self.level(step.uniform("t")), step.normal("noise", batch.shape)
        prediction, fake = self.discriminator.with_prediction(self.schedule.add_noise(x, eps, t), t, batch.cond)
        real = self.discriminator(self.schedule.add_noise(batch.x0, eps, t), t, batch.cond)
        return {"denoising": denoising(prediction, x, eps).mean(),
                "discriminator": self.settings.critic_gan_weight * discriminator_loss(real, fake).mean()}

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        t = self.level(step.uniform("t"))
        x_t = self.schedule.add_noise(x, step.normal("noise", batch.shape), t)
        real = guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond).x0
        fake, logits = self.discriminator.with_prediction(x_t, t, batch.cond)
        alpha, weight = self.of_ratio(ratio(logits), step)
        weight = dmd(x.detach(), real.detach()) * weight
        losses = {"identity": score_identity(x, real, fake.x0, alpha, weight).mean()}
        gan_weight = self.settings.gan_weight
        return losses | ({"gan": gan_weight * generator_loss(logits).mean()} if gan_weight else {})

    # -- terms -------------------------------------------------------------------------------------------------------

    def of_ratio(self, r: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """alpha and h(r) / h(1), (B,), with their gradients in r."""
        r = r if step.index >= self.settings.ratio_start else torch.ones_like(r)
        name = self.settings.divergence
        return (1 + elasticity(name, r)) / 2, relative_weight(name, r)
