"""Laws of the times of a trajectory method: t, where the state is; s, on the way; r, where the step is to land.

A law is a pure function of times (B,) float64 in [0, 1] and of draws u (B,) float64, uniform in [0, 1). Grids are
ascending, (N + 1,) float64, from the data's time to 1. t itself is drawn by a law of `times`: `discrete(grid[1:])`.

    consistency, of every or every k-th node    s = below(t, grid, k)             r = grid[0]
    trajectory consistency                      s = below(t, grid, k)             r = among(grid, grid[:1], s, u)
    consistency in segments                     s = below(t, grid)                r = below(t, edges)
    trajectory consistency in segments          s = below(t, grid)                r = among(grid, below(t, edges), s, u)
    consistency that begins as diffusion        s = ratio(t, share, schedule)     r = 0
    consistency on both sides                   s = beside(t, reach, u, v)        r = 0
    flow maps in the continuum                  t, r = ordered(law(u), law(v), alike)

How many nodes a grid has may grow while a student trains: a `Curriculum` of the training's progress.
"""
from __future__ import annotations

from math import floor, log2
from typing import Callable

import torch
from torch import Tensor

from .schedule import Schedule
from .times import shifted, uniform

Curriculum = Callable[[float], int]          # progress of the training in [0, 1) -> steps of the grid


# Grids ---------------------------------------------------------------------------------------------------------------
def grid(steps: int, shift: float = 1.0, end: float = 0.0) -> Tensor:
    """The ends of `steps` steps, even or moved towards noise by a shift above 1: (steps + 1,) ascending from `end`, the
    data's time, to 1. The edges of k equal segments are grid(k): a multiple of k steps holds them to the bit."""
    times = shifted(uniform(), shift)(torch.arange(steps + 1, dtype=torch.float64) / steps)
    return times.clamp_min(end)


# Times that follow from t --------------------------------------------------------------------------------------------
def below(t: Tensor, grid: Tensor, k: int = 1) -> Tensor:
    """The k-th node below t, the first where there are fewer. A node is not below itself, so that of the edges of
    segments it is the start of the one that holds t: an edge belongs to the segment below it."""
    return grid[(torch.searchsorted(grid, t) - k).clamp(min=0)]


def above(t: Tensor, grid: Tensor) -> Tensor:
    """The first node above t, the last where there is none."""
    return grid[torch.searchsorted(grid, t, right=True).clamp(max=len(grid) - 1)]


def among(grid: Tensor, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
    """A node from low to high, both included, each as likely; `high` itself where there is none between."""
    first, last = torch.searchsorted(grid, low), torch.searchsorted(grid, high, right=True) - 1
    found = grid[(first + (u * (last - first + 1)).long()).clamp(max=len(grid) - 1)]
    return torch.where(last >= first, found, high)


def ratio(t: Tensor, share: Tensor | float, schedule: Schedule) -> Tensor:
    """Where sigma / alpha is this share, in [0, 1], of what it is at t (Geng et al. 2024, arXiv:2406.14548, whose t it
    is). At pure noise, where it is infinite, every share but 0 is t."""
    return schedule.time_at((share * schedule.angle(t).tan()).atan())


def beside(t: Tensor, reach: float, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A time below t and one above, uniform within `reach` of it and within [0, 1] (Dao et al. 2024,
    arXiv:2412.16906)."""
    return t - u * t.clamp(max=reach), t + v * (1 - t).clamp(max=reach)


def ordered(one: Tensor, other: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
    """(t, r), the later and the earlier of two draws of a law; r = t where alike, (B,) bool (Geng et al. 2025,
    arXiv:2505.13447)."""
    t = torch.maximum(one, other)
    return t, torch.where(alike, t, torch.minimum(one, other))


# Curricula: first and last are the steps at the beginning and at the end ---------------------------------------------
def constant(steps: int) -> Curriculum:
    return lambda progress: steps


def linear(first: int, last: int, until: float = 1.0) -> Curriculum:
    """The last is reached at progress `until`."""
    return lambda progress: round(first + (last - first) * min(progress / until, 1.0))


def exponential(first: int, last: int, until: float = 1.0) -> Curriculum:
    """By equal factors in equal times, until progress `until` (Heek et al. 2024, arXiv:2403.06807)."""
    return lambda progress: round(first * (last / first) ** min(progress / until, 1.0))


def doubling(first: int, last: int) -> Curriculum:
    """Doubled at equal times, so that the last holds as long as each before (Song & Dhariwal 2023, arXiv:2310.14189,
    section 3.4)."""
    return lambda progress: min(first * 2 ** floor(progress * (log2(last / first) + 1)), last)
