"""ADD: Adversarial Diffusion Distillation. Sauer et al. 2023, arXiv:2311.17042.

    s              <- one of the student's times;  x <- its x_0 from data noised to s, and from pure noise at s = 1
    student        <- fool the heads on the pixels of x;
                      + lambda c(t) |x - the guided teacher's x_0 at x noised again to t, held fixed|^2       (section
                      3.3)
    discriminator  <- heads on a frozen vision network's features tell pictures from x, R1 at their inputs   (section
    3.2)

The heads give a logit at every position, each with a margin of its own, and read the prompt, by projection; R1 is of
the mean over positions, h of a feature. They do not read the picture that x_s was made of, which the paper finds to
help above one step. Pictures are not augmented, but may be noised (the instance noise of Sønderby et al. 2017,
arXiv:1610.04490): heads that tell two clouds apart with certainty leave no way from one mode to another.

Sources of the defaults: (p) the paper. Its models themselves were trained with the weights c of noise-free score
distillation.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, VariancePreserving, like
from ...diffusion.times import LEVELS, discrete, levels, nodes
from ...losses.adversarial import hinge_discriminator_loss, hinge_generator_loss, over_tokens, r1
from ...losses.regression import squared
from ..base import (
    Codec,
    Features,
    Frozen,
    Guidance,
    Heads,
    Inference,
    Losses,
    Method,
    Need,
    Trained,
    Update,
    check_counts,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 4                     # times that the student is trained at, evenly spaced, t = 1 among them (p)
    distillation_weight: float = 2.5   # lambda; 0 leaves the teacher out (p)
    distance: Literal["pixels", "latents"] = "pixels"    # in which it is taken: a latent costs no picture of the
                                                         # teacher's x_0 (p)
    r1_weight: float = 1e-5            # gamma of the penalty on real pictures; 0 leaves it out (p)
    noise: float = 0.0                 # largest deviation of noise on all that the heads see, uniform from 0; ours,
                                       # against lost modes
    critic_steps: int = 1              # updates of the heads a step, all on the student's own sample

    def __post_init__(self) -> None:
        check_counts(self)
        if self.distillation_weight < 0 or self.r1_weight < 0 or self.noise < 0:
            raise ValueError("the weights and noise must not be negative; found "
                             f"{self.distillation_weight}, {self.r1_weight}, {self.noise}")
        if self.distance not in ("pixels", "latents"):
            raise ValueError(f"distance must be 'pixels' or 'latents'; found {self.distance!r}")


class ADD(Method):
    Settings = Settings
    data = ("images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.discriminator = (roles[name]
                                                          for name in ("teacher", "student", "discriminator"))
        self.decode, self.features = roles["decode"], roles["features"]
        self.schedule = self.teacher.schedule
        self.started, self.level = discrete(nodes(settings.nodes)), discrete(levels())

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "decode": Codec(), "features": Features(),
                "discriminator": Heads("features", kind="tokens")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps < 1 or settings.nodes % steps:
            raise ValueError(f"add trains its student at {settings.nodes} times, those of a sampler whose steps divide "
                             f"{settings.nodes}; "
                             f"found {steps} steps")
        if isinstance(schedule, VariancePreserving) and LEVELS % settings.nodes:
            raise ValueError("a discrete schedule has evenly spaced times only where their number divides its "
                             f"{LEVELS}; "
                             f"add is set to {settings.nodes}")
        return Inference(steps, noise=1.0)

    def updates(self) -> list[Update]:
        count = self.settings.critic_steps
        return [Update(("student",), self.student_loss),
                Update(("discriminator",), self.critic_loss, repeat=count, shares=count)]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        s = self.started(step.uniform("s"))
        x = self.student(self.schedule.start(batch.x0, step.normal("start", batch.shape), s), s, batch.cond).x0
        pixels = self.decode(x)
        step.kept["pixels"] = pixels.detach()
        logits = self.discriminator(self.seen(pixels, step, "fake"), batch.cond)
        losses = {"gan": over_tokens([hinge_generator_loss(each) for each in logits]).sum(1).mean()}
        if not self.settings.distillation_weight:
            return losses
        return losses | {
            "distillation": self.settings.distillation_weight * self.distillation(x, pixels, batch, step).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        with torch.no_grad():
            real = self.seen(self.decode(batch.x0), step, "real")
            fake = self.seen(step.kept["pixels"], step, "fake")
        real = [maps.requires_grad_() for maps in real]
        logits = self.discriminator(real, batch.cond)
        pairs = zip(logits, self.discriminator(fake, batch.cond), strict=True)
        separation = over_tokens([hinge_discriminator_loss(*pair) for pair in pairs]).sum(1).mean()
        weight = self.settings.r1_weight
        return {"discriminator": separation} | ({"r1": weight * r1(over_tokens(logits), real).mean()} if weight else {})

    # -- terms -------------------------------------------------------------------------------------------------------

    def seen(self, pixels: Tensor, step: Step, name: str) -> list[Tensor]:
        """By the heads: the features of `pixels` (B, C, H, W) as they are, or under noise."""
        if self.settings.noise:
            deviation = self.settings.noise * like(step.uniform(f"deviation of {name}"), pixels)
            pixels = pixels + deviation * step.normal(f"noise on {name}", pixels.shape[1:]).to(pixels)
        return self.features(pixels)

    def distillation(self, x: Tensor, pixels: Tensor, batch: Batch, step: Step) -> Tensor:
        """c(t) |x - sg x_0(x_t)|^2 with c = alpha, (B,): its gradient is score distillation's."""
        t = self.level(step.uniform("t"))
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, step.normal("noise", batch.shape), t)
            aim = guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond).x0
            aim = self.decode(aim) if self.settings.distance == "pixels" else aim
        error = squared(pixels if self.settings.distance == "pixels" else x, aim)
        return like(self.schedule.alpha(t), error) * error
