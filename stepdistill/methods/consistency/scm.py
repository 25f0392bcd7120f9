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
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.contracts import Batch, Condition
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import RectifiedFlow, Schedule, TrigFlow, VariancePreserving
from ...diffusion.times import LEVELS, log_normal, shifted, uniform
from ...diffusion.views import viewed
from ...losses.tangent import RADIAN, exact, normalised, pushed, trig_difference, trig_pair, trig_tangent
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update

TRIG = TrigFlow()
NOISIEST = 80.0                   # sigma / alpha where sampling starts, or the schedule's end: g is 0 at pure noise,
                                  # and teaches nothing
NOISIEST_FLOW = 999.0             # of a flow: at sigma = 0.999 unit noise, which samplers begin with, is 0.1 % too
                                  # loud; at 80 1.2 %
FIRST = 1 / LEVELS                # of a network's own times, those that it was taught
INSIDE = 0.1 / LEVELS             # how far from the ends they are drawn: a timestep that is all but whole is rounded,
                                  # and has no derivative
SHIFT = 2.0                       # of a flow's sampling times towards noise: two steps meet at theta = 1.1, as in the
                                  # paper


@dataclass(frozen=True, kw_only=True)
class Settings:
    mean: float = -0.1            # of ln(tan theta) = ln(sigma / alpha) (p, ImageNet 512: -0.8 - ln 0.5; s: 0.2 - ln
                                  # 0.5 = 0.9)
    std: float = 1.6              # of ln(tan theta) (p, s)
    warmup: float = 0.1           # share of the training in which r grows (p: 10,000 updates; s: 4,000)
    damping: float = 0.1          # c (p), against the root mean square of g (f)
    derivative: Literal["exact", "pair", "difference"] = "pair"    # of F along the teacher (p: exact); see `SCM.slope`
    width: float = 0.03           # of a difference, in radians of theta

    def __post_init__(self) -> None:
        if self.std <= 0 or self.damping <= 0 or self.width <= 0:
            raise ValueError(f"std, damping and width must be above 0; found {self.std}, {self.damping}, {self.width}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the training, from 0 to 1; found {self.warmup}")
        if self.derivative not in ("exact", "pair", "difference"):
            raise ValueError(f"derivative must be 'exact', 'pair' or 'difference'; found {self.derivative!r}")


class SCM(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = (viewed(roles[name], TRIG) for name in ("teacher", "student"))
        self.own = roles["student"].schedule
        self.level = log_normal(self.own, settings.mean, settings.std)
        self.first = self.trig(torch.tensor([FIRST], dtype=torch.float64)).item()
        self.last = min(start(self.own), 1 - INSIDE)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        first, discrete = start(schedule), isinstance(schedule, VariancePreserving)
        if discrete and first == 1:
            return Inference(steps, noise=1.0)
        time = uniform() if discrete else shifted(uniform(), SHIFT)
        return Inference(steps, noise=1.0, times=tuple(min(time(1 - i / steps), first) for i in range(steps)))

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t = self.times(step)
        x = TRIG.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            velocity = guided(self.teacher, drawn(self.guidance, step))(x, t, batch.cond).v
        slope = self.slope(x, t, velocity, batch.cond)
        v = self.student(x, t, batch.cond).v
        r = min(1.0, step.progress / self.settings.warmup) if self.settings.warmup else 1.0
        g = trig_tangent(x, t, v.detach(), velocity, slope, r)
        return {"consistency": pushed(v, normalised(g, self.settings.damping)).mean()}

    # -- terms -----------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> Tensor:
        """(B,) float64, of TRIG. What the law puts beyond the noise that sampling starts in counts as that."""
        return self.trig(self.level(step.uniform("t")).clamp(FIRST + INSIDE, self.last))

    def trig(self, t: Tensor) -> Tensor:
        """The times of TRIG at the noise levels of the networks' own times t."""
        return TRIG.time_at(self.own.angle(t))

    def slope(self, x: Tensor, t: Tensor, velocity: Tensor, cond: Condition) -> Tensor:
        """dF / dtheta along the teacher's velocity.

        The exact one wants networks that are smooth in time: students of Toy, which read it through fast waves, run
        away. Those of diffusers read up to 1,000 times through sinusoids as fast as a radian a time, and what a
        variance-preserving one says between two of them nobody taught it: of the shipped teachers the exact x + dF /
        dtheta is mostly that, two to three times as large as by differences.

        A difference is off by its width, and so is the student where the loss rests: one-step samples of data of
        deviation 0.2, 0.5 and 1 are too wide by 15, 5 and 1 % by one difference of width 0.05; by a pair of
        differences, at a third more evaluations, by less than 0.05 % at 0.03 in float32.
        """
        def field(x: Tensor, t: Tensor) -> Tensor:
            return self.student(x, t, cond).v
        if self.settings.derivative == "exact":
            return exact(field, x, t, velocity, RADIAN)
        difference = {"pair": trig_pair, "difference": trig_difference}[self.settings.derivative]
        return difference(field, x, t, velocity, self.settings.width, self.first)


def start(schedule: Schedule) -> float:
    """The networks' own time at which training is cut and sampling begins, one place for both: that of NOISIEST, on
    discrete nodes the last one below it, or 1 where the schedule ends before."""
    noisiest = NOISIEST_FLOW if isinstance(schedule, RectifiedFlow) else NOISIEST
    t = schedule.time_at(torch.tensor([noisiest], dtype=torch.float64).atan()).item()
    return int(t * schedule.nodes + 1e-6) / schedule.nodes if isinstance(schedule, VariancePreserving) else t
