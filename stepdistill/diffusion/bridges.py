"""How a state x_t becomes another of the same trajectory, x_s: the second point of a consistency loss.

t, s: (B,) float64, one pair a sample. s < t is the way to the data; the deterministic solvers go up as well.

    by a teacher         bridge(SOLVERS["ddim"], guided(teacher, w), x_t, t, s, cond)
    by its SDE           bridge(partial(sde_ddim, eta=0.2), ..., n, noise)
    by the data's path   schedule.add_noise(x0, eps, s), with the x0 and the eps that made x_t: no teacher
    to where it ends     anchored(f, x_s, s, t, inside)
    two steps in one     two_in_one(guided(teacher, w), x_t, t, m, r, cond): an x_0
"""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from .contracts import Condition, Role
from .flow_map import ddim_step, secant_target
from .schedule import where
from .solvers import Noise, Solver


def bridge(solver: Solver, role: Role, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None, n: int = 1,
           noise: Noise | None = None) -> Tensor:
    """x_s by n sub-steps of a solver, even in time. noise: as solvers take it, for those that are stochastic.

    A network of discrete times was taught none between the first of them and the data: sub-steps there begin at the
    first, or at t, where that lies below it.
    """
    shares = torch.arange(1, n, dtype=torch.float64)[:, None] / n
    between = torch.maximum(t + (s - t) * shares, t.clamp(max=role.schedule.first))
    return solver(role, x_t, torch.cat([t[None], between, s[None]]), cond, noise)


def two_in_one(role: Role, x_t: Tensor, t: Tensor, m: Tensor, r: Tensor, cond: Condition | None = None) -> Tensor:
    """The x_0 (B, ...) with which one DDIM step from x_t at t lands at r where two of the role's land, by m."""
    x_m = ddim_step(role(x_t, t, cond), m)
    return secant_target(x_t, ddim_step(role(x_m, m, cond), r), t, r, role.schedule)


def anchored(f: Callable[[Tensor, Tensor], Tensor], x_s: Tensor, s: Tensor, t: Tensor, inside: Tensor) -> Tensor:
    """f(x_s, s) where `inside`, (B,) bool, and x_s itself where the trajectory, or its segment, ends at s: what keeps
    constants from being optimal. There f may have no value at s, and is asked at t for nothing."""
    return where(inside, f(x_s, torch.where(inside, s, t)), x_s)
