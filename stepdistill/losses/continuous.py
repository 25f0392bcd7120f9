"""The loss of consistency models of continuous time, sCM's, which hybrids of it share.

Lu & Song 2024, arXiv:2410.11081, algorithm 1 as distillation: under TrigFlow f = cos x - sin F(x, theta), F the
student's v, is the same all along a trajectory of the teacher where its tangent g = cos df / dtheta is 0.
"""
from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ..diffusion.continuous import FIRST, TRIG, trained_at, trig_time
from ..diffusion.contracts import Condition, Role
from ..diffusion.views import viewed
from .tangent import RADIAN, exact, normalised, pushed, trig_difference, trig_pair, trig_tangent

Derivative = Literal["exact", "pair", "difference"]
LEAST = 1e-6                       # of what is divided by


class TangentSettings(Protocol):
    """The entries of a method's settings that say how its student is made consistent.

    mean, std: of ln(tan theta) = ln(sigma / alpha). warmup: share of the training in which r grows from 0 to 1.
    damping: c, against the root mean square of g. derivative, width: see `Continuous.slope`.
    """

    mean: float
    std: float
    warmup: float
    damping: float
    derivative: Derivative
    width: float


def check_tangent(settings: TangentSettings) -> None:
    """ValueError for settings that no tangent has."""
    if settings.std <= 0 or settings.damping < LEAST or settings.width < LEAST:
        raise ValueError(f"std must be above 0, damping and width at least {LEAST:g}, below which float32 divides by "
                         f"0; found {settings.std}, {settings.damping}, {settings.width}")
    if not 0 <= settings.warmup <= 1:
        raise ValueError(f"warmup is a share of the training, from 0 to 1; found {settings.warmup}")
    if settings.derivative not in get_args(Derivative):
        raise ValueError(f"derivative must be 'exact', 'pair' or 'difference'; found {settings.derivative!r}")


class Continuous:
    """The loss of a student, continuous(x, t, velocity, cond, progress) -> (B,).

    x (B, ...): the state at times t (B,) of TRIG; velocity: the teacher's v there, guided, dx / dtheta of its
    trajectory; cond: what the student reads; progress: of the training.
    """

    def __init__(self, student: Role, settings: TangentSettings) -> None:
        self.settings, self.student = settings, viewed(student, TRIG)
        self.times = trained_at(student.schedule, settings.mean, settings.std)
        self.first = trig_time(student.schedule, torch.tensor([FIRST], dtype=torch.float64)).item()

    def __call__(self, x: Tensor, t: Tensor, velocity: Tensor, cond: Condition, progress: float) -> Tensor:
        slope = self.slope(x, t, velocity, cond)
        v = self.student(x, t, cond).v
        r = min(1.0, progress / self.settings.warmup) if self.settings.warmup else 1.0
        g = trig_tangent(x, t, v.detach(), velocity, slope, r)
        return pushed(v, normalised(g, self.settings.damping))

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
