"""rCM: Score-Regularized Continuous-Time Consistency Model. Zheng et al. 2025, arXiv:2510.08431.

    student  <- sCM's loss along the guided teacher, on data                     (the forward divergence: covers modes)
                after the warm-up, x + (real score - fake score) at x            (the reverse one: sharpens)
    repeat critic_steps times
        critic  <- denoise x of a rollout of its own
    x        <- the student's own sample by 1 to rollout_steps evaluations, from pure noise; between them
                x_0 is noised to random, descending levels

Consistency alone piles up errors of its derivative from data to noise; the score difference looks at the end of the
way. The levels of rollouts and of the scores have one law, and any number of steps is served: a rollout is not the
sampler's own grid. Any network is viewed under TrigFlow, flows exactly.

While it warms up the released code scales the tangent's parts by another power of r than sCM, and lets the critic rest;
here they are sCM's, and alike once it is whole, and the critic learns from the first step on. Sources of the defaults:
(r) the released training of Wan 2.1 1.3B, (f) NVlabs/FastGen.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ...diffusion.continuous import TRIG, sampled_at, trig_time
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import RectifiedFlow, Schedule
from ...diffusion.times import shifted, uniform
from ...diffusion.views import viewed
from ...diffusion.weighting import dmd
from ...losses.continuous import Continuous, Derivative, check_tangent
from ...losses.matching import denoising, distribution_matching
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check


@dataclass(frozen=True, kw_only=True)
class Settings:
    mean: float = 0.7             # of ln(tan theta) = ln(sigma / alpha) of the consistency (r)
    std: float = 1.6              # of ln(tan theta) (r)
    warmup: float = 0.1           # share of the training of consistency alone, whose tangent becomes whole in it (r:
                                  # 1,000 updates)
    damping: float = 0.1          # c of the normalisation (r, of the norm), against the root mean square (f)
    derivative: Derivative = "pair"    # of F along the teacher (r: exact); see `losses.continuous.Continuous.slope`
    width: float = 0.03           # of a difference, in radians of theta
    matching_weight: float | None = None    # of the score difference; None: sqrt(D) / 50 of D numbers a sample (r: 1
                                            # beside 100 of the consistency, sums of both, of a tangent of norm 1)
    critic_steps: int = 4         # critic updates a step (r)
    rollout_steps: int = 4        # at most (r)
    shift: float = 5.0            # towards noise of the levels of rollouts and scores, uniform as a flow's sigma (r)

    def __post_init__(self) -> None:
        check(self)
        check_tangent(self)
        if self.matching_weight is not None and self.matching_weight <= 0:
            raise ValueError(f"matching_weight must be above 0; found {self.matching_weight}")


class RCM(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (viewed(roles[name], TRIG)
                                                   for name in ("teacher", "student", "critic"))
        self.consistency = Continuous(roles["student"], settings)
        self.begins = trig_time(roles["student"].schedule, sampler.times[:1])

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps, noise=1.0, times=sampled_at(steps, schedule))

    def updates(self) -> list[Update]:
        return [Update(("student",), self.student_loss),
                Update(("critic",), self.critic_loss, repeat=self.settings.critic_steps)]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        t, teacher = self.consistency.times(step.uniform("t")), guided(self.teacher, drawn(self.guidance, step))
        x_t = TRIG.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            velocity = teacher(x_t, t, batch.cond).v
        losses = {"consistency": self.consistency(x_t, t, velocity, batch.cond, step.progress).mean()}
        if step.progress < self.settings.warmup:
            return losses
        x, t = self.rolled(batch, step), self.level(step.uniform("matched t"))
        with torch.no_grad():
            x_t = TRIG.add_noise(x, step.normal("matched noise", batch.shape), t)
            real, fake = (role(x_t, t, batch.cond).x0 for role in (teacher, self.critic))
        weight = self.settings.matching_weight or prod(batch.shape) ** 0.5 / 50
        return losses | {"matching": weight * distribution_matching(x, real, fake, dmd(x.detach(), real)).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        with torch.no_grad():
            x = self.rolled(batch, step)
        t, eps = self.level(step.uniform("t")), step.normal("noise", batch.shape)
        return {"denoising": denoising(self.critic(TRIG.add_noise(x, eps, t), t, batch.cond), x, eps).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def rolled(self, batch: Batch, step: Step) -> Tensor:
        """The student's own sample. Gradients flow through the last evaluation alone; all ranks take as many."""
        x, t = step.normal("start", batch.shape), self.begins.expand(len(batch))
        with torch.no_grad():
            for i in range(int(step.shared("steps") * self.settings.rollout_steps)):
                x0, t = self.student(x, t, batch.cond).x0, torch.minimum(t, self.level(step.uniform(f"rollout t {i}")))
                x = TRIG.add_noise(x0, step.normal(f"renoise {i}", batch.shape), t)
        return self.student(x, t, batch.cond).x0

    def level(self, u: Tensor) -> Tensor:
        """Times of TRIG, (B,) float64, no later than sampling begins."""
        sigma = shifted(uniform(), self.settings.shift)(u)
        return TRIG.time_at(RectifiedFlow().angle(sigma)).clamp(self.consistency.first, self.begins.item())
