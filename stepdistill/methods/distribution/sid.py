"""SiD: Score identity Distillation. Zhou et al. 2024, arXiv:2404.04057; long and short guidance: arXiv:2406.01561; few
steps, all of whose outputs are matched as one mixture: arXiv:2505.12674.

    x        <- the student's own sample, at a random step of its sampler
    critic   <- denoise x, guided at kappa_1                                             f_psi
    x        <- another
    student  <- descend (1 - alpha) |d|^2 + <d, f_psi - x> at x_t, d = f_phi - f_psi     f_phi: the teacher guided at w
                of one size at all noise levels, f_psi guided at kappa_2

Both networks are differentiated in x_t, so this costs three to five times the memory of a score difference. The loss's
value is no monitor: with a good critic it is about 0 at alpha = 1 and below 0 above.
A critic that is asked as it was trained says E[x | x_t], whatever its scale: the student comes to draw as the teacher
guided at w. Where all conditions share a covariance that is w kappa_1 / kappa_2 in general: kappa_1 = 1 and kappa_2 = w
undo guidance. Sources of the defaults: (p) the paper, (l) the released training of long and short guidance. (l) weighs
a v-network's critic as if it predicted eps, begins at time 625 of 1000, and sums over pixels; here all these are as for
the other methods.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...diffusion.contracts import Batch, Condition, Role
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.rollout import rollout, with_exit
from ...diffusion.schedule import Schedule
from ...diffusion.times import NoiseLaw
from ...diffusion.weighting import dmd
from ...losses.matching import denoising, score_identity
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check_noise, middle, noise_levels


@dataclass(frozen=True, kw_only=True)
class Settings:
    alpha: float = 1.0                 # (l); above 1 the gradient turns round where a student is much too wide (p: 1.2,
                                       # unguided)
    critic_training_guidance: float | None = None     # kappa_1, guidance scale of the critic's own loss; None: the
                                                      # teacher's, of a range its middle (l)
    critic_guidance: float | None = None    # kappa_2, guidance scale of the critic in the student's loss; None: kappa_1
                                            # (l)
    critic_steps: int = 1              # critic updates a step (p, l)
    exit_embedding: bool = False       # the critic reads by which step the sample left; else it learns the mixture of
                                       # all steps (p)
    drop: float = 0.1                  # share of prompts that student and critic do not see where the critic is guided
                                       # (l)
    noise_law: NoiseLaw = "uniform"    # of the levels at which student and critic are trained: uniform, lognormal,
                                       # shifted, mixture (l)
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those of both (l)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1

    def __post_init__(self) -> None:
        check_noise(self)
        if not 0 <= self.drop < 1 or self.critic_steps < 1:
            raise ValueError(f"drop must be in [0, 1) and critic_steps at least 1; found {self.drop}, "
                             f"{self.critic_steps}")
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative; found {self.alpha}")
        for name in ("critic_training_guidance", "critic_guidance"):
            if (scale := vars(self)[name]) is not None and scale < 1:
                raise ValueError(f"{name} is a scale of guidance, at least 1 (1 is none); found {scale}")


class SiD(Method):
    Settings = Settings
    data = ("prompts", "images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.schedule, self.level = self.teacher.schedule, noise_levels(settings, self.teacher.schedule)
        w = middle(guidance)
        self.critic_training_guidance = w if settings.critic_training_guidance is None else settings.critic_training_guidance
        self.critic_guidance = self.critic_training_guidance if settings.critic_guidance is None else settings.critic_guidance
        self.drop = 0.0 if self.critic_training_guidance == self.critic_guidance == 1 else settings.drop

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"),
                "critic": Trained("teacher", reads=("w",) * settings.exit_embedding)}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps, noise=1.0)

    @property
    def denoiser(self) -> Role:
        return guided(self.critic, self.critic_training_guidance)

    def updates(self) -> list[Update]:
        return [Update(("critic",), self.critic_loss, repeat=self.settings.critic_steps),
                Update(("student",), self.student_loss)]

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        cond = batch.cond.dropped(step.uniform("drop") < self.drop) if self.drop else batch.cond
        with torch.no_grad():
            x = rollout(self.sampler, self.student, cond, step, batch.shape)
        t, eps = self.level(step.uniform("t")), step.normal("noise", batch.shape)
        x_t = self.schedule.add_noise(x, eps, t)
        return {"denoising": denoising(self.denoiser(x_t, t, self.critic_condition(cond, step)), x, eps).mean()}

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        t = self.level(step.uniform("t"))
        x_t = self.schedule.add_noise(x, step.normal("noise", batch.shape), t)
        real = guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond).x0
        fake = guided(self.critic, self.critic_guidance)(x_t, t, self.critic_condition(batch.cond, step)).x0
        weight = dmd(x.detach(), real.detach())
        return {"identity": score_identity(x, real, fake, self.settings.alpha, weight).mean()}

    def critic_condition(self, cond: Condition, step: Step) -> Condition:
        """By the critic."""
        return with_exit(cond, self.sampler, step) if self.settings.exit_embedding else cond
