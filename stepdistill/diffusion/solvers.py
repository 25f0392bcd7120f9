"""Solvers of the probability-flow ODE (and its SDE) down a grid of times: one algorithm, one short function.

solver(role, x, times, cond, noise, seen) -> x at times[-1]. x: (B, ...), the state at times[0]; times: float64 in
[0, 1], descending, (K + 1,) or, with times of its own for each sample, (K + 1, B); noise(i, shape) is the fresh normal
noise of step i, for those that want it; seen(i, x) is shown the state that step i arrives at, at times[i + 1].
"""
from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Callable, Iterator

import torch
from torch import Tensor

from .contracts import Condition, Role
from .flow_map import ddim_step, toward
from .prediction import Prediction
from .schedule import RectifiedFlow, Schedule, like, where

Noise = Callable[[int, torch.Size], Tensor]
Seen = Callable[[int, Tensor], None]
Solver = Callable[..., Tensor]


def unseen(i: int, x: Tensor) -> None:
    """For those who want the end alone."""


def _steps(times: Tensor, batch: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(i, t, r) of each step, the times (B,) each."""
    return ((i, t.expand(batch), r.expand(batch)) for i, (t, r) in enumerate(pairwise(times)))


def ddim(role: Role, x: Tensor, times: Tensor, cond: Condition | None = None, noise: Noise | None = None,
         seen: Seen = unseen) -> Tensor:
    """Song et al. 2021, arXiv:2010.02502: order 1, K evaluations. It is also Euler's rule, in the `_straight`
    coordinates."""
    for i, t, r in _steps(times, len(x)):
        x = ddim_step(role(x, t, cond), r)
        seen(i, x)
    return x


def _straight(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(m, u), such that x_t / m is a straight line in u for a fixed (x_0, eps): where the stock schedulers integrate.

    Karras et al. 2022 divide by alpha and step in sigma / alpha; a flow, whose alpha vanishes at t = 1, is straight in
    sigma.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return (alpha + sigma, sigma) if isinstance(schedule, RectifiedFlow) else (alpha, sigma / alpha)


def _slope(p: Prediction) -> Tensor:
    """d(x_t / m) / du of `_straight`."""
    return p.eps - p.x0 if isinstance(p.schedule, RectifiedFlow) else p.eps


NOISY = 20.0                      # sigma / alpha beyond which `heun_step` may give way to DDIM's; Stable Diffusion ends
                                  # at 14.6


def trapezoid(here: Prediction, there: Prediction) -> Tensor:
    """Heun's rule as stock schedulers have it: from here.x_t to there.t, where `there` was evaluated at the end of an
    Euler step."""
    x, ((m_t, u_t), (m_r, u_r)) = here.x_t, (_straight(p.schedule, p.t) for p in (here, there))
    return like(m_r / m_t, x) * x + like(m_r * (u_r - u_t) / 2, x) * (_slope(here) + _slope(there))


def long_step(schedule: Schedule, t: Tensor, r: Tensor) -> Tensor:
    """Whether DDIM's step from t to r, (B,), is nearer to the ODE than Heun's: (B,) bool.

    Heun's rule integrates x / alpha in u = sigma / alpha. Near pure noise of data of deviation 1 the exact state there
    is sqrt(1 + u^2) times a constant, DDIM's step from u_t >> 1 to u_r lands on u_r, short by 1 / (2 u_r), and the
    trapezoid beyond it by (u_t - u_r) / (2 u_r^2): less is DDIM's where u_t > 3 u_r. On alpha = 0 the trapezoid is not
    even defined. Below NOISY it is left alone, as in the stock schedulers. A flow is integrated in sigma, which has no
    such end.
    """
    if isinstance(schedule, RectifiedFlow):
        return torch.zeros_like(t, dtype=torch.bool, device="cpu")
    ratio_t, ratio_r = (schedule.angle(u).tan().abs() for u in (t, r))
    return (ratio_t > NOISY) & (ratio_t > 3 * ratio_r)


def heun_step(here: Prediction, there: Prediction) -> Tensor:
    """`trapezoid`, or DDIM's step where it is nearer (`long_step`)."""
    euler = ddim_step(here, there.t)
    long = long_step(here.schedule, here.t, there.t)
    if not long.any():
        return trapezoid(here, there)
    # Where the trapezoid is not used it is taken from `there` to itself, so that no infinite number reaches a gradient.
    near = replace(here, t=torch.where(long, there.t, here.t))
    return where(long, euler, trapezoid(near, there))


def heun(role: Role, x: Tensor, times: Tensor, cond: Condition | None = None, noise: Noise | None = None,
         seen: Seen = unseen) -> Tensor:
    """Karras et al. 2022, arXiv:2206.00364, algorithm 1: order 2, 2K evaluations; a last step to t = 0 is Euler's, and
    so is a long one from nearly pure noise (`long_step`)."""
    for i, t, r in _steps(times, len(x)):
        here = role(x, t, cond)
        x, inner = ddim_step(here, r), r > 0
        if inner.any():
            x = where(inner, heun_step(here, role(x, torch.where(inner, r, t), cond)), x)
        seen(i, x)
    return x


def dpmpp_2m_step(before: Prediction, here: Prediction, r: Tensor) -> Tensor:
    """From here.t to r, extrapolating x_0 along lambda = log(alpha / sigma) through the previous evaluation."""
    schedule, t = here.schedule, here.t
    past, now, next = (schedule.log_snr(s) / 2 for s in (before.t, t, r))
    weight = like((next - now) / (now - past) / 2, here.x_t)
    return toward(here.x0 + weight * (here.x0 - before.x0), here.x_t, t, r, schedule)


def dpmpp_2m(role: Role, x: Tensor, times: Tensor, cond: Condition | None = None, noise: Noise | None = None,
             seen: Seen = unseen) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, arXiv:2211.01095, algorithm 2: order 2, K evaluations.

    The first step, and one that ends at t = 0 (where lambda is infinite), are DDIM's.
    """
    before = None
    for i, t, r in _steps(times, len(x)):
        here = role(x, t, cond)
        x, inner = ddim_step(here, r), r > 0
        if before is not None and inner.any():
            x = where(inner, dpmpp_2m_step(before, here, torch.where(inner, r, t)), x)
        before = here
        seen(i, x)
    return x


def sde_ddim(role: Role, x: Tensor, times: Tensor, cond: Condition | None = None, noise: Noise | None = None,
             seen: Seen = unseen, eta: float = 1.0) -> Tensor:
    """Song et al. 2021, arXiv:2010.02502, eq. 12 and 16: a share of each step's noise is fresh; eta = 1 is DDPM, 0 is
    `ddim`."""
    if noise is None:
        raise ValueError("sde_ddim is stochastic: pass noise(i, shape), which gives the normal noise of step i")
    schedule = role.schedule
    for i, t, r in _steps(times, len(x)):
        if (r > t).any():
            raise ValueError(f"sde_ddim goes down in time alone; found a step from {t.tolist()} to {r.tolist()}")
        p = role(x, t, cond)
        kept, sigma_r = schedule.alpha(t) / schedule.alpha(r), schedule.sigma(r)
        fresh = eta * sigma_r / schedule.sigma(t) * (schedule.sigma(t) ** 2 - (kept * sigma_r) ** 2).sqrt()
        old = (sigma_r**2 - fresh**2).sqrt()
        x = like(schedule.alpha(r), x) * p.x0 + like(old, x) * p.eps + like(fresh, x) * noise(i, x.shape).to(x)
        seen(i, x)
    return x


def addim_step(p: Prediction, r: Tensor, x_var: Tensor) -> Tensor:
    """DDIM that restores the variance which x_0's mean lacks. x_var (B,): the variance of x_0 per dimension given x_t.

    Heek et al. 2024, arXiv:2403.06807 (aDDIM): x_r = alpha_r x_0 + sqrt(sigma_r^2 + (d / |eps|^2) z_var) eps, with
    z_var = (alpha_r - alpha_t sigma_r / sigma_t)^2 x_var.
    """
    schedule, t, x = p.schedule, p.t, p.x_t
    share = (schedule.alpha(r) - schedule.alpha(t) * schedule.sigma(r) / schedule.sigma(t)) ** 2
    missing = like(share, x) * like(x_var, x) / like((p.eps.flatten(1) ** 2).mean(1), x)
    return like(schedule.alpha(r), x) * p.x0 + (like(schedule.sigma(r) ** 2, x) + missing).sqrt() * p.eps


def addim(role: Role, x: Tensor, times: Tensor, cond: Condition | None = None, noise: Noise | None = None,
          seen: Seen = unseen) -> Tensor:
    """aDDIM as a sampler, with the paper's guess x_var = 0.1 / (2 + SNR) for data of unit variance."""
    for i, t, r in _steps(times, len(x)):
        p = role(x, t, cond)
        snr = (role.schedule.alpha(t) / role.schedule.sigma(t)) ** 2
        x = addim_step(p, r, 0.1 / (2 + snr))
        seen(i, x)
    return x


SOLVERS: dict[str, Solver] = {
    "ddim": ddim,
    "euler": ddim,                # the same step: the stock schedulers differ in their grid and in how they start
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "sde_ddim": sde_ddim,
    "addim": addim,
}
STOCHASTIC = ("sde_ddim",)        # those whose end is no function of their start
