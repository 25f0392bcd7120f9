"""Laws by which t is drawn: a law maps u (B,) float64, uniform in [0, 1), to t (B,) float64 in [0, 1]."""
from __future__ import annotations

from math import atan
from typing import Callable, Literal, Sequence, get_args

import torch
from torch import Tensor

from .schedule import Schedule, VariancePreserving

Law = Callable[[Tensor], Tensor]


def uniform(low: float = 0.0, high: float = 1.0) -> Law:
    return lambda u: low + (high - low) * u


def log_normal(schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> Law:
    """ln(sigma / alpha) ~ N(mean, std^2): Karras et al. 2022, arXiv:2206.00364, table 1, for any schedule."""
    return lambda u: schedule.time_at((mean + std * _normal(u)).exp().atan())


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Law:
    """logit t ~ N(mean, std^2): Esser et al. 2024, arXiv:2403.03206, eq. 19."""
    return lambda u: (mean + std * _normal(u)).sigmoid()


def shifted(law: Law, shift: float) -> Law:
    """Towards noise for shift > 1: s t / (1 + (s - 1) t), Esser et al. 2024, eq. 23."""
    def shifted_law(u: Tensor) -> Tensor:
        t = law(u)
        return shift * t / (1 + (shift - 1) * t)
    return shifted_law


def discrete(grid: Tensor) -> Law:
    """Every node of the grid, (N,) float64, equally likely."""
    return lambda u: grid[(u * len(grid)).long()]


def weighted(grid: Tensor, shares: Sequence[float]) -> Law:
    """Node i of the grid, (N,) float64, with probability shares[i]; they sum to 1."""
    edges = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    return lambda u: grid[torch.searchsorted(edges / edges[-1], u, right=True).clamp(max=len(grid) - 1)]


def nodes(n: int) -> Tensor:
    """The ends of n equal segments of [0, 1], ascending from 1 / n to 1: with n = N, the nodes of a discrete
    schedule."""
    return torch.arange(1, n + 1, dtype=torch.float64) / n


def even(steps: int) -> Tensor:
    """The ends of equal steps from noise to data: (steps + 1,) float64, descending from 1 to 0."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def trailing(steps: int, schedule: Schedule) -> Tensor:
    """When stock samplers of trailing steps call the network, and 0, where they end: (steps + 1,) float64, descending
    from 1.

    On discrete nodes each time is rounded to one, halves to even. The grid of twice the steps holds this one.
    """
    i = torch.arange(steps + 1, dtype=torch.float64)
    if not isinstance(schedule, VariancePreserving):
        return 1 - i / steps
    return (schedule.nodes - i * schedule.nodes / steps).round() / schedule.nodes


LEVELS = 1000                     # training times of every stock scheduler: time i lies at t = (i + 1) / LEVELS


def levels(low: float = 0.0, high: float = 1.0) -> Tensor:
    """The times of stock schedulers from number floor(low LEVELS) to floor(high LEVELS), the last one being LEVELS -
    1."""
    return (torch.arange(int(low * LEVELS), min(int(high * LEVELS), LEVELS - 1) + 1, dtype=torch.float64) + 1) / LEVELS


NoiseLaw = Literal["uniform", "lognormal", "shifted", "mixture"]
NOISE_LAWS: tuple[str, ...] = get_args(NoiseLaw)


def noise_law(name: str, schedule: Schedule, t_range: tuple[float, float] = (0.0, 1.0), mean: float = -1.2,
              std: float = 1.2,
              shift: float = 3.0) -> Law:
    """Noise levels at which distributions are matched and critics trained, on the stock times of t_range, ends
    included.

    uniform: all times alike (Yin et al. 2024, arXiv:2311.18828). lognormal: ln(sigma / alpha) ~ N(mean, std^2) (Karras
    et al. 2022, arXiv:2206.00364, table 1; Luo et al. 2023, arXiv:2305.18455). shifted: uniform, moved towards noise
    where shift > 1 (Esser et al. 2024, arXiv:2403.03206, eq. 23). mixture: half of the draws uniform, half lognormal.
    High noise decides how much each mode of the data weighs, low noise which shape it has: a law that leaves one of
    them out leaves that unlearned.

    Each time has the probability of the cell around it; what lies outside t_range is left out. ValueError for any other
    name, and for numbers that leave t_range without a probability.
    """
    grid = levels(*t_range)
    if name == "uniform":
        return discrete(grid)
    edges = torch.cat([grid - 0.5 / LEVELS, grid[-1:] + 0.5 / LEVELS])
    # the outer cells reach to the ends
    edges = torch.where(edges < 1 / LEVELS, 0.0, torch.where(edges > 1, 1.0, edges))
    if name == "shifted":
        shares = (edges / (shift - (shift - 1) * edges)).diff()
    elif name in ("lognormal", "mixture"):
        below = torch.special.ndtr((schedule.angle(edges).tan().log() - mean) / std)
        # t = 1 stands for all noise beyond the schedule's end
        shares = torch.where(edges == 1, 1.0, below).diff()
    else:
        raise ValueError(f"noise_law is one of {', '.join(NOISE_LAWS)}; found {name!r}")
    if not shares.sum() > 1e-9:
        raise ValueError(f"a {name} law with mean {mean:g} and std {std:g} puts no draw in t_range {t_range}")
    shares = shares / shares.sum()
    return weighted(grid, (shares if name != "mixture" else (shares + 1 / len(grid)) / 2).tolist())


def karras(schedule: Schedule, n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """n nodes, descending: Karras et al. 2022, eq. 5, with sigma / alpha for their sigma."""
    low, high = schedule.angle(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    if not low <= atan(sigma_min) < atan(sigma_max) <= high + 1e-12:
        raise ValueError(f"sigma / alpha from {sigma_min} to {sigma_max} leaves the schedule, which ends at "
                         f"{torch.tensor(high, dtype=torch.float64).tan().item():.6g}")
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    ratio = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return schedule.time_at(ratio.atan())


def _normal(u: Tensor) -> Tensor:
    """The standard normal quantile; u = 0, which a uniform draw may give, counts as half its resolution."""
    return torch.special.ndtri(u.clamp(min=2.0**-54))
