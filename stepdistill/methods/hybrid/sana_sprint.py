"""SANA-Sprint. Chen et al. 2025, arXiv:2503.09641: sCM, whose student reads the guidance scale, and LADD.

    student        <- sCM's loss along the teacher guided at w                  (the student reads w)
    x              <- the student's x_0 from data noised to t, in half of the draws from pure noise
                      and fool the heads on x, noised again to s
    discriminator  <- heads on the frozen teacher's features tell noised data from noised x, each at its own s

Consistency alone errs most at pure noise, where sampling begins: there the heads judge half of what they see. Any
network is viewed under TrigFlow, which is exact; the paper first tunes its teacher for a dense embedding of such times.
Latents have a deviation of 1 where the paper scales them to 0.5: its laws of theta are moved by -ln 0.5.

Left out: the learned weight of the consistency loss, as in scm; and the data under prompts of other samples, which the
heads are shown as false too: a sample here never depends on its neighbours in a batch.

Source of the defaults: (r) the released training of the 1.6B student.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.continuous import TRIG, sampled_at, trig_time
from ...diffusion.contracts import Batch, Condition
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided, with_scale
from ...diffusion.schedule import Schedule, where
from ...diffusion.times import log_normal
from ...diffusion.views import viewed
from ...losses.adversarial import hinge_discriminator_loss, hinge_generator_loss, over_tokens
from ...losses.continuous import Continuous, Derivative, check_tangent
from ..base import Frozen, Guidance, Heads, Inference, Losses, Method, Need, Trained, Update, check, middle


@dataclass(frozen=True, kw_only=True)
class Settings:
    mean: float = 0.9             # of ln(tan theta) = ln(sigma / alpha) (r: 0.2, of latents of deviation 0.5)
    std: float = 1.6              # of ln(tan theta) (r)
    warmup: float = 0.1           # share of the training in which the tangent becomes whole (r: 4,000 updates)
    damping: float = 0.1          # c of the normalisation, against the root mean square of the tangent (r, of its norm)
    derivative: Derivative = "pair"    # of F along the teacher (r: exact); see `losses.continuous.Continuous.slope`
    width: float = 0.03           # of a difference, in radians of theta
    gan_weight: float = 0.5       # of fooling the heads (r, beside a consistency whose weight is learned)
    noise_share: float = 0.5      # of what the heads judge, made from pure noise (r)
    judged_mean: float = 0.1      # of ln(sigma / alpha) at which they judge (r: -0.6, of latents of deviation 0.5)
    judged_std: float = 1.0       # of ln(sigma / alpha) at which they judge (r)
    guidance_embedding: bool = True    # the student reads the guidance scale; else its weights hold the mean over the
                                       # range (r)

    def __post_init__(self) -> None:
        check(self)
        check_tangent(self)
        if not 0 <= self.noise_share <= 1 or self.judged_std <= 0:
            raise ValueError("noise_share must be from 0 to 1, and judged_std above 0; found "
                             f"{self.noise_share}, {self.judged_std}")


class SanaSprint(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.schedule, self.discriminator = roles["teacher"].schedule, roles["discriminator"]
        self.teacher, self.student = (viewed(roles[name], TRIG) for name in ("teacher", "student"))
        self.consistency = Continuous(roles["student"], settings)
        self.begins = trig_time(self.schedule, sampler.times[:1])
        self.judged = log_normal(self.schedule, settings.judged_mean, settings.judged_std)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        student = Trained("teacher", reads=("w",) * settings.guidance_embedding)
        return {"teacher": Frozen(), "student": student, "discriminator": Heads("teacher", kind="tokens")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        scale = middle(guidance) if settings.guidance_embedding else None
        return Inference(steps, noise=1.0, times=sampled_at(steps, schedule), guidance=scale)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.student_loss), Update(("discriminator",), self.critic_loss, shares=1)]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        t, w = self.consistency.times(step.uniform("t")), drawn(self.guidance, step)
        told = with_scale(batch.cond, w) if self.settings.guidance_embedding else batch.cond
        x_t = TRIG.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            velocity = guided(self.teacher, w)(x_t, t, batch.cond).v
        consistency = self.consistency(x_t, t, velocity, told, step.progress).mean()
        x = self.sample(batch, step, told)
        step.kept["sample"] = x.detach()
        fooled = over_tokens([hinge_generator_loss(each) for each in self.logits(x, batch, step, "fake")])
        return {"consistency": consistency, "gan": self.settings.gan_weight * fooled.mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        real = self.logits(batch.x0, batch, step, "real")
        fake = self.logits(step.kept["sample"], batch, step, "fake")
        losses = [hinge_discriminator_loss(*pair) for pair in zip(real, fake, strict=True)]
        return {"discriminator": over_tokens(losses).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def sample(self, batch: Batch, step: Step, told: Condition) -> Tensor:
        """The student's x_0 from pure noise, as its sampler begins, or from noised data."""
        pure, noise = step.uniform("pure") < self.settings.noise_share, step.normal("start", batch.shape)
        t = torch.where(pure, self.begins, self.consistency.times(step.uniform("judged t")))
        return self.student(where(pure, noise.to(batch.x0), TRIG.add_noise(batch.x0, noise, t)), t, told).x0

    def logits(self, x: Tensor, batch: Batch, step: Step, name: str) -> list[Tensor]:
        """K maps of logits, (B, N) each, of x, noised to a level of its own."""
        s = self.judged(step.uniform(f"{name} s"))
        noised = self.schedule.add_noise(x, step.normal(f"{name} noise", batch.shape), s)
        return self.discriminator(noised, s, batch.cond)
