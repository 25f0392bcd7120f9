"""sCM: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models. Lu & Song 2024, arXiv:2410.11081,
algorithm 1 as distillation, sCD.

    theta  <- ln(tan theta) normal, x = cos x_0 + sin eps                       (TrigFlow; networks of any schedule are
    viewed so)
    f      =  cos x - sin F(x, theta),  F the student's v                         (the consistency function)
    g      <- cos df/dtheta along dx/dtheta = v of the guided teacher             (its second part weighted by r, from 0
    to 1)
    F      <- F + g / (|g| + c)

At the teacher's flow map g is 0 everywhere, without a grid and its errors. Latents are scaled to a deviation of 1,
which takes the place of the paper's sigma_data = 0.5 for pixels: all depends on x / sigma_data alone, the law of theta
included.

Left out is the paper's learned weight e^-l(t) of the loss: it evens out the size of the losses of different times, and
the normalisation of g has done most of that already. rCM (arXiv:2510.08431) trains without it.

Sources of the defaults: (p) the paper, (s) SANA-Sprint's released training of text-to-image students, (f)
NVlabs/FastGen.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...diffusion.continuous import TRIG, sampled_at
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule
from ...diffusion.views import viewed
from ...losses.continuous import Continuous, Derivative, check_tangent
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update


@dataclass(frozen=True, kw_only=True)
class Settings:
    mean: float = -0.1            # of ln(tan theta) = ln(sigma / alpha) (p, ImageNet 512: -0.8 - ln 0.5; s: 0.2 - ln
                                  # 0.5 = 0.9)
    std: float = 1.6              # of ln(tan theta) (p, s)
    warmup: float = 0.1           # share of the training in which r grows (p: 10,000 updates; s: 4,000)
    damping: float = 0.1          # c (p), against the root mean square of g (f)
    derivative: Derivative = "pair"    # of F along the teacher (p: exact); see `losses.continuous.Continuous.slope`
    width: float = 0.03           # of a difference, in radians of theta

    def __post_init__(self) -> None:
        check_tangent(self)


class SCM(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher = viewed(roles["teacher"], TRIG)
        self.consistency = Continuous(roles["student"], settings)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps, noise=1.0, times=sampled_at(steps, schedule))

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t = self.consistency.times(step.uniform("t"))
        x = TRIG.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            velocity = guided(self.teacher, drawn(self.guidance, step))(x, t, batch.cond).v
        return {"consistency": self.consistency(x, t, velocity, batch.cond, step.progress).mean()}
