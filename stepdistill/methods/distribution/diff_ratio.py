"""DiffRatio: Training One-Step Diffusion Models Without Teacher Supervision. Chen et al. 2025, arXiv:2502.08005.

    x        <- the student's own sample
    student  <- up the log ratio of the densities of data and student at the noised x, by its gradient in x
    repeat critic_steps times
        critic and its heads  <- tell noised data from noised x: the logit's optimum is that log ratio

The gradient of log p(x_t) - log q(x_t) in x_t is the difference of the scores by which methods with a teacher move
their student; here one classifier stands for both networks, and no teacher is asked. Other divergences than the reverse
Kullback-Leibler one weigh the gradient by the ratio itself (see `losses.divergence`). The classifier is a copy of the
teacher with heads, where the paper has a lightweight network; the student begins as the teacher, which the paper found
indispensable.

Sources: the abstract and accounts of the paper, (o) ours; its code was not to be had, and its law and weight of the
noise levels were not told. Of guidance the student learns what its data have: samples of a guided teacher have it.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.rollout import rollout
from ...diffusion.schedule import Schedule, like
from ...diffusion.times import NoiseLaw
from ...losses.adversarial import discriminator_loss
from ...losses.divergence import DIVERGENCES, DivergenceName, ratio, relative_weight
from ..base import (
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

POWERS = {"score": 0, "eps": 1, "x0": 2}       # of sigma / alpha, by which the log ratio is weighed


@dataclass(frozen=True, kw_only=True)
class Settings:
    divergence: DivergenceName = "reverse_kl"  # forward_kl, js, softened_rkl, hellinger, jeffreys (o)
    weight: Literal["score", "eps", "x0"] = "eps"      # of noise levels: x moves by the difference of scores times
                                       # alpha, of the noises, or of the x_0, which is DMD's (o)
    critic_steps: int = 1              # classifier updates a step (o)
    noise_law: NoiseLaw = "uniform"    # of the levels of student and classifier: uniform, lognormal, shifted,
                                       # mixture (o)
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those at which the student is moved (o)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1
    start_time: float | None = None    # at which a one-step student begins, with unit noise; None: t = 1

    def __post_init__(self) -> None:
        check_noise(self)
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; found {self.divergence!r}")
        if self.weight not in POWERS:
            raise ValueError(f"weight must be one of {', '.join(POWERS)}; found {self.weight!r}")
        if self.weight != "score" and self.t_range[1] >= 0.999:
            raise ValueError(f"t_range must end below 0.999 with weight = {self.weight!r}, which has no bound at t = 1 "
                             f"of a flow; found {self.t_range}")


class DiffRatio(Method):
    Settings = Settings
    data = ("images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.student, self.discriminator, self.schedule = (roles["student"], roles["discriminator"],
                                                           roles["student"].schedule)
        self.moved, self.trained = (noise_levels(settings, self.schedule, whole) for whole in (False, True))

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"student": Trained("teacher"), "critic": Trained("teacher"), "discriminator": Heads("critic")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return renoising(settings, steps)

    @property
    def denoiser(self) -> None:
        """The critic only carries heads."""

    def updates(self) -> list[Update]:
        return [Update(("student",), self.student_loss),
                Update(("critic", "discriminator"), self.critic_loss, repeat=self.settings.critic_steps, shares=1)]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        step.kept["sample"] = x.detach()
        t = self.moved(step.uniform("t"))
        logits = self.discriminator(self.schedule.add_noise(x, step.normal("noise", batch.shape), t), t, batch.cond)
        weight = self.level_weight(t).to(logits) * relative_weight(self.settings.divergence, ratio(logits.detach()))
        return {"log_ratio": -(like(weight, logits) * logits).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        t, eps = self.trained(step.uniform("t")), step.normal("noise", batch.shape)
        real, fake = (self.discriminator(self.schedule.add_noise(clean, eps, t), t, batch.cond)
                      for clean in (batch.x0, self.sample(batch, step)))
        return {"discriminator": discriminator_loss(real, fake).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def level_weight(self, t: Tensor) -> Tensor:
        """(B,) float64."""
        return (self.schedule.sigma(t) / self.schedule.alpha(t)) ** POWERS[self.settings.weight]

    @torch.no_grad()
    def sample(self, batch: Batch, step: Step) -> Tensor:
        """The sample that the student was just trained on, where the batch is shared, or a new one."""
        if "sample" in step.kept:
            return step.kept["sample"]
        return rollout(self.sampler, self.student, batch.cond, step, batch.shape)
