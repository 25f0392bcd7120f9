"""A figure with the interval that holds its truth in about 95 of 100 repetitions."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z = 1.96                          # 97.5 % of a normal law lie below


@dataclass(frozen=True)
class Estimate:
    """low and high are None where nothing is known of the spread."""

    value: float
    low: float | None
    high: float | None

    def named(self, name: str) -> dict[str, float | None]:
        """As a row of results.json has it: name, name_low and name_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def around(value: float, variance: float, freedom: float = float("inf")) -> Estimate:
    """value with its variance, which is known with so many degrees of freedom."""
    half = student(freedom) * max(variance, 0.0) ** 0.5
    return Estimate(value, value - half, value + half)


def student(freedom: float) -> float:
    """97.5 % of Student's t lie below: Cornish & Fisher's expansion, within 1 % from 4 degrees of freedom."""
    first, second, third = Z**3 + Z, 5 * Z**5 + 16 * Z**3 + 3 * Z, 3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z
    return Z + first / (4 * freedom) + second / (96 * freedom**2) + third / (384 * freedom**3)


def mean_of(values: Tensor) -> Estimate:
    """The mean of n independent values (n,). Nothing is known of a single one's spread."""
    x = values.double().cpu()
    if len(x) < 2:
        return Estimate(x.mean().item(), None, None)
    return around(x.mean().item(), x.var().item() / len(x), len(x) - 1)


def share_of(share: float, n: int) -> Estimate:
    """A share seen in n independent cases, with Wilson's interval."""
    centre, half = share + Z * Z / (2 * n), Z * (share * (1 - share) / n + Z * Z / (4 * n * n)) ** 0.5
    low, high = ((centre + side) / (1 + Z * Z / n) for side in (-half, half))
    return Estimate(share, min(low, share), max(high, share))   # which at 0 and 1 rounding would cross


def jackknife(left_out: Sequence[Tensor]) -> Tensor:
    """The variance of a figure by the independent sets that it is made of: Tukey 1958.

    left_out: for each set (blocks, ...) the figure without one of its blocks, which are of about one size.
    """
    return sum(((of_set - of_set.mean(0)).square().sum(0) * (len(of_set) - 1) / len(of_set) for of_set in left_out),
               torch.zeros((), dtype=torch.float64))


def ratio_of(over: Tensor, under: Tensor) -> Estimate:
    """mean(over) / mean(under) of n independent pairs (n,), (n,), at least two; what both sides of a pair share
    cancels. By the jackknife, with n - 1 degrees of freedom."""
    x, y = over.double().cpu(), under.double().cpu()
    left_out = (x.sum() - x) / (y.sum() - y)
    return around((x.sum() / y.sum()).item(), jackknife([left_out]).item(), len(x) - 1)
