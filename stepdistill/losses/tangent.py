"""Tangents: how what a student says changes along the teacher's trajectories, and the loss that carries it back.

f(x, t) is a student at a fixed condition, (B, ...) and (B,) float64 -> (B, ...). Its derivative at (x, t) along (dx,
dt) is d f(x + s dx, t + s dt) / ds at s = 0, with dx (B, ...) and dt a number; no gradient flows through it, and
autocast is off in it, since a tangent is a small difference of large numbers.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import pi

import torch
from torch import Tensor

from ..diffusion.schedule import TrigFlow, like
from .regression import squared

Field = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor], tuple[Tensor, Tensor]]
RADIAN = 2 / pi                   # in the times of TrigFlow


def _precise(x: Tensor) -> AbstractContextManager:
    """Without autocast, which the meta device of a plan does not know."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


@torch.no_grad()
def exact(f: Field, x: Tensor, t: Tensor, dx: Tensor, dt: float) -> Tensor:
    """By forward differentiation: about five evaluations of a network in time, and two in memory.

    Most attention kernels have no forward derivative: a role of a network sees to that itself.
    """
    with _precise(x):
        return torch.func.jvp(f, (x, t), (dx, torch.full_like(t, dt)))[1]


def straight(back: Tensor) -> tuple[Tensor, Tensor]:
    """What a step of `back` (B,) against dx is made of, (of x, of -dx): on a line, as Euler's."""
    return torch.ones_like(back), back


def turned(back: Tensor) -> tuple[Tensor, Tensor]:
    """On TrigFlow's circle, as DDIM's, `back` in radians."""
    return back.cos(), back.sin()


@torch.no_grad()
def difference(f: Field, x: Tensor, t: Tensor, dx: Tensor, dt: float, back: Tensor, step: Step = straight,
               first: float = 0.0) -> Tensor:
    """By the secant from a step of `back`, (B,) float64 above 0, before: two evaluations. Times stay at `first` or
    above.

    On a line it is off by back / 2 times the second derivative, and by the rounding error of f over back.
    """
    with _precise(x):
        return _secant(f(x, t), f, x, t, dx, dt, back, step, first)


@torch.no_grad()
def pair(f: Field, x: Tensor, t: Tensor, dx: Tensor, dt: float, back: Tensor, step: Step = straight,
         first: float = 0.0) -> Tensor:
    """`difference` extrapolated from a step and its half (Richardson 1911): of second order, three evaluations. It
    looks back as well, and is the backward differentiation formula of order 2, which damps what errs."""
    with _precise(x):
        now = f(x, t)
        half, whole = (_secant(now, f, x, t, dx, dt, share * back, step, first) for share in (0.5, 1.0))
        return 2 * half - whole


def _secant(now: Tensor, f: Field, x: Tensor, t: Tensor, dx: Tensor, dt: float, back: Tensor, step: Step,
            first: float) -> Tensor:
    kept, gone = (like(c, x) for c in step(back))
    return (kept * now - f(kept * x - gone * dx, (t - back * dt).clamp(min=first))) / gone


def trig_difference(f: Field, x: Tensor, t: Tensor, velocity: Tensor, width: float, first: float = 0.0) -> Tensor:
    """df / dtheta under TrigFlow along dx / dtheta = velocity, by the secant from theta - width, no further than t =
    first, where one step of DDIM leads: two evaluations. NVlabs/rcm's, arXiv:2510.08431.

    It is off by width / 2 times f + d2f / dtheta2, which is zero where the trajectory keeps its x_0 and eps; and by the
    rounding error of f over width: 1e-5 |f| for float32 and up to half of |f| for bfloat16 weights, at 0.05. It looks
    back, where students are right sooner: what they learn travels from data to noise, and schemes that look both ways
    do not damp what errs.
    """
    return difference(f, x, t, velocity, RADIAN, _back(t, width, first), turned, first)


def trig_pair(f: Field, x: Tensor, t: Tensor, velocity: Tensor, width: float, first: float = 0.0) -> Tensor:
    """`trig_difference` as a `pair`. Rounding errors of f are about six times those of one difference of this width:
    4e-5 |f| for float32 at 0.03."""
    return pair(f, x, t, velocity, RADIAN, _back(t, width, first), turned, first)


def _back(t: Tensor, width: float, first: float) -> Tensor:
    return ((t - first) / RADIAN).clamp(max=width)


def trig_tangent(x: Tensor, t: Tensor, v: Tensor, velocity: Tensor, slope: Tensor, r: float = 1.0) -> Tensor:
    """cos df / dtheta of the consistency function f = cos x - sin v under TrigFlow, theta = pi t / 2.

    x, v, velocity, slope (B, ...): the state, the student's v and the teacher's at it, and dv / dtheta of the student
    along the teacher's. r weighs what makes it a consistency model: at 0 it points from v to velocity. Lu & Song 2024,
    arXiv:2410.11081, section 4.1, with sigma_data = 1.
    """
    cos, sin = (like(c, x) for c in (TrigFlow().alpha(t), TrigFlow().sigma(t)))
    return cos**2 * (velocity - v) - r * cos * sin * (x + slope)


def normalised(g: Tensor, c: float) -> Tensor:
    """g / (rms + c), rms the root mean square of a sample: Lu & Song 2024, section 4.1, free of the sample's size."""
    return g / (g.square().flatten(1).mean(1).sqrt() + c).reshape(-1, *[1] * (g.ndim - 1))


def pushed(v: Tensor, g: Tensor) -> Tensor:
    """A loss (B,) whose gradient in v is -2 g over the size of a sample, and whose value is the mean of g^2."""
    return squared(v, (v + g).detach())
