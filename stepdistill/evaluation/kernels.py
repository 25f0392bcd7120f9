"""Distances between two laws by a kernel: the maximum mean discrepancy, which is unbiased where samples are few.

Everything is computed in float64 on the CPU. D is the width of a feature.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .estimate import Estimate, around

KID_BLOCK = 1000
SIGMA, SCALE = 10.0, 1000.0       # of CMMD


def kid(features: Tensor, subset: Tensor) -> Estimate:
    """Unbiased squared MMD under the kernel (x . y / D + 1)^3, Bińkowski et al. 2018, arXiv:1801.01401, by
    torchmetrics.

    features (n, D), subset (m, D): of generated pictures, and of the reference's, at least 2 of each. The mean over
    disjoint blocks of one size, at most 1,000: each is taken at least once, so that nothing is drawn and equal features
    give an equal figure. The interval counts the chance of both sides, see `_variance`.
    """
    from torchmetrics.image.kid import poly_mmd  # here, because torchmetrics brings matplotlib's pyplot with it

    both = subset, features
    size = min(len(side) // -(-len(side) // KID_BLOCK) for side in both)
    real, fake = ([block for block in side.split(size) if len(block) == size] for side in both)
    rounds = max(len(real), len(fake))
    value = sum(poly_mmd(*(side[i % len(side)].double().cpu() for side in (real, fake))).item()
                for i in range(rounds)) / rounds
    y, x = (side[: 2 * KID_BLOCK].double().cpu() for side in both)
    variance = _variance(_cubic(x, x), _cubic(y, y), _cubic(x, y), len(features), len(subset), size)
    return around(value, variance)


def kid_slopes(features: Tensor, subset: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of the KID towards each of the features (n,) and each of the subset (m,), float64: twice the mean
    kernel to the own side less that to the other."""
    x, y = features.double().cpu(), subset.double().cpu()
    xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
    own = lambda kernel: (kernel.sum(1) - kernel.diagonal()) / (len(kernel) - 1)
    return 2 * (own(xx) - xy.mean(1)), 2 * (own(yy) - xy.mean(0))


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def cmmd(features: Tensor, subset: Tensor) -> Estimate:
    """1,000 times the squared MMD under a Gaussian kernel of width 10 on CLIP's projections of length 1, Jayasumana et
    al. 2024, arXiv:2401.09603, which takes the biased estimate, as here.

    features (n, D), subset (m, D). Of as many of the first samples as the subset has, since the kernel is of all pairs.
    """
    y = F.normalize(subset.double().cpu(), dim=1)
    x = F.normalize(features.double().cpu()[: len(y)], dim=1)
    kernel = lambda a, b: torch.exp((a @ b.T - 1) / SIGMA**2)           # |a - b|^2 = 2 - 2 a . b
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    variance = _variance(xx, yy, xy, len(x), len(y), min(len(x), len(y)))
    return around(SCALE * (xx.mean() + yy.mean() - 2 * xy.mean()).item(), SCALE**2 * variance)


def _variance(xx: Tensor, yy: Tensor, xy: Tensor, n: int, m: int, block: int) -> float:
    """Of the squared MMD from n and m samples, taken in blocks: Hoeffding's decomposition of a U-statistic.

    xx, yy, xy: the kernel between samples (a, a), (b, b), (a, b), of which there may be fewer than n and m. The first
    order is 4 Var h / n a side, with h(x) the mean kernel to the own side less that to the other. A mean over samples
    carries the second order too, which is taken off. The second order is the variance of the doubly centred kernel,
    over the pairs of a block.
    """
    a, b = xy.shape
    second = lambda kernel: (kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()).square().mean()
    of_xx, of_yy, of_xy = second(xx), second(yy), second(xy)
    own = lambda kernel: (kernel.sum(1) - kernel.diagonal()) / (len(kernel) - 1)
    by_x = ((own(xx) - xy.mean(1)).var() - of_xx / a - of_xy / b).clamp(min=0)
    by_y = ((own(yy) - xy.mean(0)).var() - of_yy / b - of_xy / a).clamp(min=0)
    pairs = 2 * of_xx / (n * block) + 2 * of_yy / (m * block) + 4 * of_xy / (min(n, m) * block)
    return (4 * by_x / n + 4 * by_y / m + pairs).item()
