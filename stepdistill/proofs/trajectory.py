"""Trajectories of a solver in closed form: where its steps carry the states of a Gaussian teacher, and who knows it.

Along each principal axis, of variance V, one step from t to r multiplies x_t - alpha_t m by a known factor: that of the
exact flow map in the limit of a fine grid, and another on a coarse one. A consistency loss vanishes at the product of
its own steps.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..diffusion.consistency import scalings
from ..diffusion.contracts import Batch, Condition, Role
from ..diffusion.draws import Step
from ..diffusion.flow_map import secant_target
from ..diffusion.schedule import RectifiedFlow, Schedule, like
from .problem import Affine, FunctionRole, Problem, gradient

Factor = Callable[[Schedule, Tensor, Tensor, Tensor], Tensor]       # (schedule, V (D,), t (n, 1), r (n, 1)) -> (n, D)


def ddim_factor(schedule: Schedule, variances: Tensor, t: Tensor, r: Tensor) -> Tensor:
    (a_t, s_t), (a_r, s_r) = ((schedule.alpha(u), schedule.sigma(u)) for u in (t, r))
    return (a_r * a_t * variances + s_r * s_t) / (a_t**2 * variances + s_t**2)


def sde_factor(eta: float) -> Factor:
    """Of the mean of DDIM's steps of which a share of the noise is fresh: what of x_t's own noise is left is less."""
    def factor(schedule: Schedule, variances: Tensor, t: Tensor, r: Tensor) -> Tensor:
        (a_t, s_t), (a_r, s_r) = ((schedule.alpha(u), schedule.sigma(u)) for u in (t, r))
        fresh = eta * s_r / s_t * (s_t**2 - (a_t * s_r / a_r) ** 2).sqrt()
        return (a_r * a_t * variances + (s_r**2 - fresh**2).sqrt() * s_t) / (a_t**2 * variances + s_t**2)
    return factor


def heun_factor(schedule: Schedule, variances: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The trapezoidal rule on dy / du = g(u) y: y = x / alpha, u = sigma / alpha, of a flow y = x, u = t."""
    (a_t, s_t), (a_r, s_r) = ((schedule.alpha(u), schedule.sigma(u)) for u in (t, r))
    if isinstance(schedule, RectifiedFlow):
        scale, h, slopes = 1.0, s_r - s_t, [(s - a * variances) / (a**2 * variances + s**2)
                                            for a, s in ((a_t, s_t), (a_r, s_r))]
    else:
        u_t, u_r = s_t / a_t, s_r / a_r
        scale, h, slopes = a_r / a_t, u_r - u_t, [u / (variances + u**2) for u in (u_t, u_r)]
    return scale * (1 + h / 2 * (slopes[0] + slopes[1] * (1 + h * slopes[0])))


@dataclass
class Trajectory:
    """The guided teacher's, by steps between neighbours of `grid` (n,), descending; `factors` (n - 1, D) of those
    steps."""

    problem: Problem
    grid: Tensor
    factors: Tensor

    @classmethod
    def of(cls, problem: Problem, grid: Tensor, factor: Factor) -> Trajectory:
        return cls(problem, grid, factor(problem.schedule, problem.axes[0], grid[:-1, None], grid[1:, None]))

    @cached_property
    def _products(self) -> Tensor:
        """Of the factors from each time to the last: (n, D)."""
        return torch.cat([self.factors.flip(0).cumprod(0).flip(0), torch.ones_like(self.factors[:1])])

    def _at(self, t: Tensor) -> Tensor:
        return self._products[(t[:, None] - self.grid).abs().argmin(1)]

    def carried(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """x_r of x_t (B, D); t, r (B,) on the grid."""
        mean, schedule = self.problem.guided_cond(len(t), self.problem.w).text, self.problem.schedule
        axes = self.problem.axes[1]
        along = (x_t - like(schedule.alpha(t), x_t) * mean) @ axes * (self._at(t) / self._at(r))
        return like(schedule.alpha(r), x_t) * mean + along @ axes.T

    def consistent(self) -> FunctionRole:
        """The student whose consistency function lands at the grid's last time."""
        def x0(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            c_skip, c_out = scalings(self.problem.schedule, t)
            f = self.carried(x, t, self.grid[-1].expand(len(t)))
            return (f - like(c_skip, x) * x) / like(torch.where(c_out == 0, 1.0, c_out), x)
        return FunctionRole(self.problem.schedule, x0, self.problem.kind)

    def consistency_gradient(self, learner: Affine, batch: Batch, step: Step, t: Tensor, s: Tensor,
                             target: Affine) -> Tensor:
        """In the learner, of its consistency function's squared distance to the target's, fixed, at x_s of this
        trajectory."""
        def f(role: Affine, x: Tensor, u: Tensor) -> Tensor:
            c_skip, c_out = scalings(self.problem.schedule, u)
            return like(c_skip, x) * x + like(c_out, x) * (role.m + x @ role.S.T)

        x_t = self.problem.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        x_s = self.carried(x_t, t, s)
        fixed = torch.where(like(s, x_s) > self.grid[-1], f(target, x_s, s), x_s).detach()
        return gradient((f(learner, x_t, t) - fixed).square().mean(), learner)

    def landing(self, r: Tensor) -> FunctionRole:
        """The student whose DDIM step from any time above r (B,) lands at r."""
        def x0(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            above = t > r
            begin, end = torch.where(above, t, 1.0), torch.where(above, r, 0.5)
            found = secant_target(x, self.carried(x, t, r), begin, end, self.problem.schedule)
            return torch.where(like(above, x) > 0, found, x)
        return FunctionRole(self.problem.schedule, x0, self.problem.kind)

    def segmented(self, steps: int) -> FunctionRole:
        """The student whose DDIM step from any time of the grid lands at the start of its segment, of `steps` even
        ones."""
        def x0(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            return self.landing(start(t, steps))(x, t, cond).x0
        return FunctionRole(self.problem.schedule, x0, self.problem.kind)


def start(t: Tensor, steps: int) -> Tensor:
    """Of the segment that holds t, of `steps` even ones; an edge is the end of the one below."""
    return ((steps * t - 1e-9).floor() / steps).clamp(min=0)


def bent(student: Role, add: Tensor, times: Tensor) -> FunctionRole:
    """A student whose x_0 is that of another, + add + times x_t, by numbers (B, D) of each sample."""
    def x0(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return student(x, t, cond).x0 + add + times * x
    return FunctionRole(student.schedule, x0, student.kind)
