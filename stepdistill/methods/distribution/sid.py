"""SiD: Score identity Distillation. Zhou et al. 2024, arXiv:2404.04057; long and short guidance: arXiv:2406.01561; few
steps, all of whose outputs are matched as one mixture: arXiv:2505.12674.

    x        <- the student's own sample, at a random step of its sampler
    critic   <- denoise x, guided at kappa_1                                             f_psi
                with images: tell them from x, noised alike, by the mean of its own features at every position
    x        <- another
    student  <- descend (1 - alpha) |d|^2 + <d, f_psi - x> at x_t, d = f_phi - f_psi     f_phi: the teacher guided at w
                of one size at all noise levels, f_psi guided at kappa_2
                with images: be taken for one

Both networks are differentiated in x_t, at three to five times the memory of a score difference. The loss's value is no
monitor: with a good critic it is about 0 at alpha = 1 and below 0 above.
A critic that is asked as it was trained says E[x | x_t], whatever its scale: the student comes to draw as the teacher
guided at w. Where all conditions share a covariance that is w kappa_1 / kappa_2 in general: kappa_1 = 1 and kappa_2 = w
undo guidance. kappa = 0 is a critic that reads no prompt, with an unguided teacher Zero-CFG, and below 0 it is
Anti-CFG; the few-step paper has both for training with images, whose term keeps text and picture together.
Sources of the defaults: (p) the paper, (l) the released training of long and short guidance, (d) that of diffusion
transformers, which holds the student still for its first 20,000 images.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.contracts import Batch, Condition, Role
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.rollout import rollout, with_exit
from ...diffusion.schedule import Schedule, like
from ...diffusion.times import NoiseLaw
from ...diffusion.weighting import dmd
from ...losses.adversarial import discriminator_loss, generator_loss, over_tokens
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
    middle,
    noise_levels,
    renoising,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    alpha: float = 1.0                 # (l); above 1 the gradient turns round where a student is much too wide (p: 1.2)
    critic_training_guidance: float | None = None     # kappa_1, guidance scale of the critic's own loss, 0 without the
                                                      # prompt; None: the teacher's, of a range its middle (l)
    critic_guidance: float | None = None    # kappa_2, the same in the student's loss; None: kappa_1 (l)
    critic_steps: int = 1              # critic updates a step (p, l)
    exit_embedding: bool = False       # the critic reads by which step a sample left; else it learns their mixture (p)
    drop: float = 0.1                  # share of prompts that student and critic do not see where it is guided (l)
    gan_weight: float = 0.0            # of being taken for an image; 0 is without images (d, with them: 0.01)
    critic_gan_weight: float = 0.5     # of telling images from samples, in the critic's update (d)
    gan_start: int = 156               # updates of the student before it (d: 40,000 images, 256 a batch)
    start_time: float | None = None    # of one-step students, with unit noise; None: t = 1 (l: 0.626, timestep 625)
    noise_law: NoiseLaw = "uniform"    # of the levels at which student and critic are trained: uniform, lognormal,
                                       # shifted, mixture (l)
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those of both (l)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1

    def __post_init__(self) -> None:
        check_noise(self)
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative; found {self.alpha}")


class SiD(Method):
    Settings = Settings
    data = ("prompts", "images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.schedule, self.level = self.teacher.schedule, noise_levels(settings, self.teacher.schedule)
        trained, asked = settings.critic_training_guidance, settings.critic_guidance
        self.critic_training_guidance = middle(guidance) if trained is None else trained
        self.critic_guidance = self.critic_training_guidance if asked is None else asked
        self.drop = 0.0 if {self.critic_training_guidance, self.critic_guidance} in ({0}, {1}) else settings.drop
        self.discriminator = roles.get("discriminator")

    @classmethod
    def refusal(cls, settings: Settings, data: str) -> str | None:
        return None if not settings.gan_weight or data != "prompts" else (
            f"gan_weight is {settings.gan_weight:g}, and the critic is to tell images from samples: give data.images, "
            "or set gan_weight: 0")

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        critic = Trained("teacher", reads=("w",) * settings.exit_embedding)
        needs: dict[str, Need] = {"teacher": Frozen(), "student": Trained("teacher"), "critic": critic}
        return needs | ({"discriminator": Heads("critic", kind="channels")} if settings.gan_weight else {})

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return renoising(settings, steps)

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
        x_t, told = self.schedule.add_noise(x, eps, t), self.critic_condition(cond, step)
        losses = {"denoising": denoising(self.denoiser(x_t, t, told), x, eps).mean()}
        if self.discriminator is None:
            return losses
        real, fake = (self.logits(noised, t, told) for noised in (self.schedule.add_noise(batch.x0, eps, t), x_t))
        apart = over_tokens([discriminator_loss(*pair) for pair in zip(real, fake, strict=True)])
        return losses | {"discriminator": self.settings.critic_gan_weight * apart.mean()}

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        t, told = self.level(step.uniform("t")), self.critic_condition(batch.cond, step)
        x_t = self.schedule.add_noise(x, step.normal("noise", batch.shape), t)
        real = guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond).x0
        fake = guided(self.critic, self.critic_guidance)(x_t, t, told).x0
        weight = dmd(x.detach(), real.detach())
        losses = {"identity": score_identity(x, real, fake, self.settings.alpha, weight).mean()}
        if self.discriminator is None:
            return losses
        fooled = over_tokens([generator_loss(each) for each in self.logits(x_t, t, told)])
        begun = step.index >= self.settings.gan_start
        return losses | {"gan": self.settings.gan_weight * begun * (like(weight, fooled) * fooled).mean()}

    def logits(self, x_t: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        """Of the critic's features, told the prompt whatever the scale."""
        return [each.clamp(-10, 10) for each in self.discriminator(x_t, t, cond)]

    def critic_condition(self, cond: Condition, step: Step) -> Condition:
        return with_exit(cond, self.sampler, step) if self.settings.exit_embedding else cond
