"""DMD2: Improved Distribution Matching Distillation. Yin et al. 2024, arXiv:2405.14867.

    x               <- the student's own sample, at a random step of its sampler     (backward simulation, section 4.5)
    student         <- x + (real score - fake score), fool the discriminator         (section 4.1: no pairs)
    repeat critic_steps times                                                        (two time scales, section 4.2)
        critic         <- denoise the student's samples
        discriminator  <- tell noised real from noised fake, on the critic's features (section 4.3)

`decoupled` is Decoupled DMD (Liu et al. 2025, arXiv:2511.22677, eq. 8; no code, and no weights told): the unguided
teacher is matched at all levels, and what guidance adds to it moves x at levels below the exit's, each of one size.

Sources: (p) the paper, (x) its released SDXL training, which draws the discriminator's noise level anew.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.contracts import Batch, Condition
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.prediction import Prediction
from ...diffusion.rollout import below_exit, rollout, with_exit
from ...diffusion.schedule import Schedule
from ...diffusion.times import NoiseLaw
from ...diffusion.weighting import dmd
from ...losses.adversarial import discriminator_loss, generator_loss
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
    critic_steps: int = 5              # critic updates a step (p: 5; 10 for SD 1.5)
    share_rollout: bool = False        # all of them on the student's own sample: cheaper, another estimator
    exit_embedding: bool = False       # the critic reads the exit; else it learns the mixture of all of them (p)
    decoupled: bool = False            # what guidance adds acts below the exit's own level
    noise_law: NoiseLaw = "uniform"    # of student's and critic's levels: uniform, lognormal, shifted, mixture (p)
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those at which the scores are matched (p)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1
    start_time: float | None = None    # at which a one-step student begins, with unit noise; None: t = 1 (x: 0.4)
    gan_weight: float = 5e-3           # of fooling the discriminator; 0 leaves it out, and real images with it (x)
    critic_gan_weight: float = 1e-2    # of telling real from fake, in the critic's update (x)

    def __post_init__(self) -> None:
        check_noise(self)


class DMD2(Method):
    Settings = Settings
    data = ("prompts", "images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.discriminator = roles.get("discriminator")
        self.matched, self.trained = (noise_levels(settings, self.teacher.schedule, whole) for whole in (False, True))

    @classmethod
    def refusal(cls, settings: Settings, data: str) -> str | None:
        if not settings.gan_weight or data != "prompts":
            return None
        return (f"gan_weight is {settings.gan_weight:g}, and the discriminator is shown real images: give data.images, "
                "or set gan_weight: 0 to train on prompts alone")

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        critic = Trained("teacher", reads=("w",) * settings.exit_embedding)
        needs: dict[str, Need] = {"teacher": Frozen(), "student": Trained("teacher"), "critic": critic}
        return needs | ({"discriminator": Heads("critic")} if settings.gan_weight else {})

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return renoising(settings, steps)

    def updates(self) -> list[Update]:
        s, two = self.settings, ("critic", "discriminator")
        return [Update(("student",), self.student_loss),
                Update(two if self.discriminator else two[:1], self.critic_loss, repeat=s.critic_steps,
                       shares=s.critic_steps if s.share_rollout else 1)]

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        cond = self.critic_condition(batch, step)
        step.kept.update(sample=x.detach(), cond=cond)
        t = self.matched(step.uniform("t"))
        seen = x if self.discriminator else x.detach()        # gradients go through the critic only to fool it
        x_t = self.teacher.schedule.add_noise(seen, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            w = 1.0 if self.settings.decoupled else drawn(self.guidance, step)
            real = guided(self.teacher, w)(x_t, t, batch.cond).x0
        fake, logits = self.critic_and_logits(x_t, t, cond)
        losses = {"matching": distribution_matching(x, real, fake.x0.detach(), dmd(x.detach(), real)).mean()}
        losses |= {"guidance": self.augmentation(x, batch, step).mean()} if self.settings.decoupled else {}
        return losses if logits is None else losses | {"gan": self.settings.gan_weight * generator_loss(logits).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        x, cond = self.sample(batch, step)
        t, eps = self.trained(step.uniform("t")), step.normal("noise", batch.shape)
        prediction, logits = self.critic_and_logits(self.critic.schedule.add_noise(x, eps, t), t, cond)
        losses = {"denoising": denoising(prediction, x, eps).mean()}
        if logits is None:
            return losses
        t = self.trained(step.uniform("real t"))
        real = self.critic.schedule.add_noise(batch.x0, step.normal("real noise", batch.shape), t)
        separation = discriminator_loss(self.discriminator(real, t, cond), logits).mean()
        return losses | {"discriminator": self.settings.critic_gan_weight * separation}

    def augmentation(self, x: Tensor, batch: Batch, step: Step) -> Tensor:
        """(B,), with the gradient of x less what guidance adds to the teacher's x_0, below the exit's level."""
        t = below_exit(self.sampler, step, self.matched(step.uniform("guidance t")))
        x_t = self.teacher.schedule.add_noise(x.detach(), step.normal("guidance noise", batch.shape), t)
        with torch.no_grad():
            given, without = (guided(self.teacher, w)(x_t, t, batch.cond).x0 for w in (drawn(self.guidance, step), 1.0))
        return distribution_matching(x, given, without, dmd(x.detach(), given))

    @torch.no_grad()
    def sample(self, batch: Batch, step: Step) -> tuple[Tensor, Condition]:
        """The student's sample, the one it was just trained on where the batch is shared; the critic's condition."""
        if "sample" in step.kept:
            return step.kept["sample"], step.kept["cond"]
        return rollout(self.sampler, self.student, batch.cond, step, batch.shape), self.critic_condition(batch, step)

    def critic_condition(self, batch: Batch, step: Step) -> Condition:
        """By the critic and the discriminator."""
        return with_exit(batch.cond, self.sampler, step) if self.settings.exit_embedding else batch.cond

    def critic_and_logits(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Prediction, Tensor | None]:
        """The critic's prediction and, of the same pass, the discriminator's logits."""
        if self.discriminator is None:
            return self.critic(x_t, t, cond), None
        return self.discriminator.with_prediction(x_t, t, cond)
