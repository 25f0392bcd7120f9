"""The map from a point of a trajectory to a later one, as a student learns it: one DDIM step of a predicted x_0.

The identity at r = t is built in, r = 0 returns the predicted x_0, and for a rectified flow it is x + (r - t) u. A
network that reads the landing time finds it in its condition's `r`; nothing here puts it there.
"""
from __future__ import annotations

from torch import Tensor

from .contracts import Condition, Role
from .prediction import Prediction
from .schedule import Schedule, like


def ddim_step(prediction: Prediction, r: Tensor) -> Tensor:
    """x_r = alpha_r x_0 + sigma_r eps (Song et al. 2021, arXiv:2010.02502, eq. 12 with no noise). r: (B,) float64."""
    schedule, x_t = prediction.schedule, prediction.x_t
    return like(schedule.alpha(r), x_t) * prediction.x0 + like(schedule.sigma(r), x_t) * prediction.eps


def toward(x0: Tensor, x_t: Tensor, t: Tensor, r: Tensor, schedule: Schedule) -> Tensor:
    """The DDIM step from x_t (B, ...) at t (B,) to r (B,) that believes in x0 (B, ...), whoever said so; needs sigma_t
    > 0."""
    ratio = schedule.sigma(r) / schedule.sigma(t)
    return like(schedule.alpha(r) - ratio * schedule.alpha(t), x_t) * x0 + like(ratio, x_t) * x_t


def secant_target(x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor, schedule: Schedule) -> Tensor:
    """The one x_0 whose DDIM step from x_t at t lands on x_r at r < t: the inverse of `toward`.

    x_0 = (x_r - q x_t) / (alpha_r - q alpha_t), q = sigma_r / sigma_t: Salimans & Ho 2022, arXiv:2202.00512, appendix
    G. The denominator vanishes with t - r, and rounding errors grow as its inverse.
    """
    if (r >= t).any():
        raise ValueError(f"a secant needs r < t for every sample, found t={t.tolist()} and r={r.tolist()}")
    q = schedule.sigma(r) / schedule.sigma(t)
    scale = schedule.alpha(r) - q * schedule.alpha(t)
    return like(1 / scale, x_t) * x_r - like(q / scale, x_t) * x_t


def flow_map(role: Role, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition | None = None) -> Tensor:
    """G(x_t, t -> r) of a network: its guess of where the trajectory through x_t at t is at r. t, r: (B,) float64."""
    return ddim_step(role(x_t, t, cond), r)
