"""SMD, SMT: Score-of-Mixture Training. Jayashankar et al. 2025, arXiv:2502.09609.

    x        <- the student's own sample, a: a share drawn for it
    r        <- exp( heads ) at the noised x: teacher's density over the student's
    student  <- x + r / (a r + 1 - a) (real score - fake score), and be taken for the teacher's part of the mixture
    repeat critic_steps times
        critic  <- denoise x
        heads   <- D_a = a r / (a r + 1 - a) makes D_a real + (1 - D_a) fake the score of the mixture: regress it on the
                   fake score at noised x and on the real score at noised data, with weights 1 - a and a

The skewed Jensen-Shannon divergence of all mixtures a p + (1 - a) q at once; at a = 1 it is DMD's. `source: data`, SMT,
has no teacher and no heads: one critic, which reads a, denoises both parts, and the student moves by what it says at a
less what it says at 0, made as large as at 1. Our heads judge the frozen teacher, the released ones the critic, whose
ratio has no bounds. Source of the defaults: (r) the released SMD of ImageNet 64.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.contracts import Batch, Condition
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided, with_share
from ...diffusion.rollout import rollout
from ...diffusion.schedule import Schedule
from ...diffusion.times import NoiseLaw
from ...diffusion.weighting import dmd
from ...losses.adversarial import generator_loss
from ...losses.divergence import mixture_logits, mixture_weight, ratio
from ...losses.matching import denoising, distribution_matching
from ...losses.regression import squared
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
    source: Literal["teacher", "data"] = "teacher"     # of the scores of mixtures: SMD, or SMT
    shares: tuple[float, float] = (0.5, 1.0)    # the a of the student, uniform; of SMT [0, 1] (r)
    none: float = 0.25                 # share of the critic's draws at a = 0, the others uniform on [0, 1] (r)
    critic_steps: int = 5              # critic updates a step (r)
    gan_weight: float = 3e-3           # of being taken for the teacher's, with a teacher (r)
    start_time: float | None = None    # at which a one-step student begins, with unit noise; None: t = 1
    noise_law: NoiseLaw = "uniform"    # of the student's levels and the critic's: uniform, lognormal, shifted, mixture
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those at which the scores are matched (r)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1

    def __post_init__(self) -> None:
        check_noise(self)
        if self.source not in ("teacher", "data"):
            raise ValueError(f"source must be 'teacher' or 'data'; found {self.source!r}")
        if self.source == "data" and self.gan_weight != Settings.gan_weight:
            raise ValueError("gan_weight must be left out: `source: data` has no heads")
        if not 0 <= self.shares[0] <= self.shares[1] <= 1 or not 0 <= self.none < 1:
            raise ValueError(f"shares must lie in [0, 1] and none in [0, 1); found {self.shares}, {self.none}")


class SMD(Method):
    Settings = Settings
    data = ("images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.student, self.critic, self.schedule = roles["student"], roles["critic"], roles["student"].schedule
        self.teacher, self.discriminator = roles.get("teacher"), roles.get("discriminator")
        self.matched, self.trained = (noise_levels(settings, self.schedule, whole) for whole in (False, True))

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        trained = Trained("teacher")
        if settings.source == "data": return {"student": trained, "critic": Trained("teacher", reads=("share",))}
        return {"teacher": Frozen(), "student": trained, "critic": trained, "discriminator": Heads("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return renoising(settings, steps)

    def updates(self) -> list[Update]:
        n = self.settings.critic_steps
        if self.settings.source == "data":
            return [Update(("student",), self.learned_loss), Update(("critic",), self.mixed_loss, repeat=n)]
        return [Update(("student",), self.student_loss),
                Update(("critic", "discriminator"), self.critic_loss, repeat=n)]

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x, x_t, t, a = self.noised(batch, step)
        with torch.no_grad():
            real, fake = self.scores("x0", x_t, t, batch.cond, step)
        logits = self.discriminator(x_t, t, batch.cond)
        weight = dmd(x.detach(), real) * mixture_weight(a.to(logits), ratio(logits.detach())).to(x)
        losses, gan = {"matching": distribution_matching(x, real, fake, weight).mean()}, self.settings.gan_weight
        return losses | ({"gan": gan * generator_loss(mixture_logits(logits, a)).mean()} if gan else {})

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        x, t, eps, a = self.drawn(batch, step)
        x_t, data_t = (self.schedule.add_noise(clean, eps, t) for clean in (x, batch.x0))
        of_fake, of_real = (mixture_logits(self.discriminator(y, t, batch.cond), a).sigmoid() for y in (x_t, data_t))
        with torch.no_grad():
            apart, apart_at_data = (squared(*self.scores("v", y, t, batch.cond, step)) for y in (x_t, data_t))
        a = a.to(apart)
        mixture = (1 - a) * apart * of_fake.square().mean(1) + a * apart_at_data * (1 - of_real).square().mean(1)
        return {"denoising": denoising(self.critic(x_t, t, batch.cond), x, eps).mean(), "mixture": mixture.mean()}

    def learned_loss(self, batch: Batch, step: Step) -> Losses:
        x, x_t, t, a = self.noised(batch, step)
        with torch.no_grad():
            fake, mixed, real = (self.critic(x_t, t, with_share(batch.cond, b)).x0 for b in (0 * a, a, 0 * a + 1))
        larger = ((squared(real, fake) + 1e-6) / (squared(mixed, fake) + 1e-6)).sqrt()       # the released addition
        return {"matching": distribution_matching(x, mixed, fake, dmd(x.detach(), real) * larger).mean()}

    def mixed_loss(self, batch: Batch, step: Step) -> Losses:
        x, t, eps, a = self.drawn(batch, step)
        say = lambda x_t: self.critic(x_t, t, with_share(batch.cond, a))
        of_fake, of_real = (denoising(say(self.schedule.add_noise(y, eps, t)), y, eps) for y in (x, batch.x0))
        return {"denoising": ((1 - a.to(of_fake)) * of_fake + a.to(of_real) * of_real).mean()}

    def noised(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The student's sample, noised, its time, and its share a (B,) float64."""
        x, (low, high) = rollout(self.sampler, self.student, batch.cond, step, batch.shape), self.settings.shares
        t, a = self.matched(step.uniform("t")), low + (high - low) * step.uniform("share")
        return x, self.schedule.add_noise(x, step.normal("noise", batch.shape), t), t, a

    @torch.no_grad()
    def drawn(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample, time, noise and share of the critic."""
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        a = torch.where(step.uniform("none") < self.settings.none, 0.0, step.uniform("share"))
        return x, self.trained(step.uniform("t")), step.normal("noise", batch.shape), a

    def scores(self, kind: str, x_t: Tensor, t: Tensor, cond: Condition, step: Step) -> list[Tensor]:
        """What the guided teacher and the critic say, in a view."""
        real = guided(self.teacher, drawn(self.guidance, step))
        return [role(x_t, t, cond).view(kind) for role in (real, self.critic)]
