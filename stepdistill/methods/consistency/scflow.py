"""SCFlow: Self-Corrected Flow Distillation for Consistent One-Step and Few-Step Text-to-Image Generation. Dao et al.
2024, arXiv:2412.16906.

    z(x, t)        =  the student's x_0; z' that of its running average
    t              <- uniform, x_t <- noise the data to t
    x_low, x_high  <- steps of the guided teacher from x_t to times within `reach` below and above t, one evaluation for
                      both
    student        <- d( z(x_t, t), z'(x_low) ), the data's own x_0 where low is below `anchor`
                      + d( z(x_t, t), z'(x_high) )
                      + | z(x, t) - z_1 |^2 on x, the line from z_1 to the noise e that it was made of: self-correction
                      + fool the heads on z_1 = z(e, 1)
    discriminator  <- heads on the frozen teacher's features tell noised data from noised z_1, both at low

It is sampled by Euler's or DDIM's steps, which keep e: where the self-correction holds each of them ends at z_1, so
that few steps agree with one. It is at odds with consistency where the teacher's ways are curved; the paper's
text-to-image teacher has been straightened by reflow. Here the student is updated first, and both on one sample.

Sources of the defaults: (c) the authors' code, its CelebA-HQ script where the two differ by data.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import ddim_step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, where
from ...diffusion.times import LEVELS, discrete, levels
from ...diffusion.triples import beside
from ...losses.adversarial import discriminator_loss, generator_loss
from ...losses.regression import DistanceName, distance, squared
from ..base import Follows, Frozen, Guidance, Heads, Inference, Losses, Method, Need, Trained, Update, check

WEIGHTS = ("high_weight", "self_weight", "gan_weight")


@dataclass(frozen=True, kw_only=True)
class Settings:
    reach: float = 0.1             # of the neighbours (c)
    anchor: float = 0.1            # below it the data are the target (c: text to image; CelebA-HQ 0.4)
    loss: DistanceName = "huber"   # d (c)
    huber_c: float = 0.01          # c of the pseudo-Huber loss (c)
    high_weight: float = 0.1       # of the neighbour above (c)
    self_weight: float = 0.1       # of the self-correction (c)
    gan_weight: float = 0.1        # of fooling the heads; 0 leaves them out (c)
    warmup_updates: int = 1000     # before the neighbour above and the self-correction join (c)
    target_decay: float = 0.9      # of the running average per update (c)

    def __post_init__(self) -> None:
        check(self)
        if not 0 < self.reach <= 1 or not 1 / LEVELS <= self.anchor <= 1:
            raise ValueError(f"reach must be in (0, 1] and anchor from {1 / LEVELS} to 1; found {self.reach}, "
                             f"{self.anchor}")
        if self.warmup_updates < 0 or min(vars(self)[name] for name in WEIGHTS) < 0:
            raise ValueError(f"warmup_updates, {', '.join(WEIGHTS)} must not be negative; found {vars(self)}")


class SCFlow(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.target = (roles[name] for name in ("teacher", "student", "target"))
        self.discriminator, self.schedule = roles.get("discriminator"), self.student.schedule
        self.distance = distance(settings.loss, settings.huber_c)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        needs: dict[str, Need] = {"teacher": Frozen(), "student": Trained("teacher"),
                                  "target": Follows("student", settings.target_decay)}
        return needs | ({"discriminator": Heads("teacher")} if settings.gan_weight else {})

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps)

    def updates(self) -> list[Update]:
        heads = [Update(("discriminator",), self.critic_loss, shares=1)] if self.discriminator else []
        return [Update(("student",), self.student_loss), *heads]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        joined = step.index >= self.settings.warmup_updates
        t, low, high = self.times(step)
        x_t = self.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            here = guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond)
            inside = low >= self.settings.anchor
            below = self.target(ddim_step(here, low), torch.where(inside, low, t), batch.cond).x0
            above = self.target(ddim_step(here, high), high, batch.cond).x0 if joined else None
        z = self.student(x_t, t, batch.cond).x0
        losses = {"consistency": self.distance(z, where(inside, below, batch.x0)).mean()}
        if joined:
            losses["high"] = self.settings.high_weight * self.distance(z, above).mean()
        return losses | self.one_step(batch, step, t, low, joined)

    def one_step(self, batch: Batch, step: Step, t: Tensor, low: Tensor, joined: bool) -> Losses:
        """What is asked of z_1."""
        if not joined and self.discriminator is None:
            return {}
        e, losses = step.normal("start", batch.shape), {}
        z_1 = self.student(e, torch.ones_like(t), batch.cond).x0
        if joined:
            again = self.student(self.schedule.add_noise(z_1.detach(), e, t), t, batch.cond).x0
            losses["self"] = self.settings.self_weight * squared(again, z_1.detach()).mean()
        if self.discriminator is not None:
            step.kept.update(fake=z_1.detach(), t=low.clamp(min=1 / LEVELS))
            losses["gan"] = self.settings.gan_weight * generator_loss(self.logits(z_1, batch, step)).mean()
        return losses

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        real, fake = (self.logits(x, batch, step) for x in (batch.x0, step.kept["fake"]))
        return {"discriminator": discriminator_loss(real, fake).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """t uniform on the stock times, one below and one above within reach: (B,) float64."""
        t = discrete(levels())(step.uniform("t"))
        return t, *beside(t, self.settings.reach, step.uniform("low"), step.uniform("high"))

    def logits(self, x: Tensor, batch: Batch, step: Step) -> Tensor:
        """Logits (B, K) of x, noised to the time below t."""
        noised = self.schedule.add_noise(x, step.normal("judged noise", batch.shape), step.kept["t"])
        return self.discriminator(noised, step.kept["t"], batch.cond)
