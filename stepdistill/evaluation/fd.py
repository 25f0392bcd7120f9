"""Distances between sets of features, each checked against a known truth in tests/evaluation/test_fd.py.

Everything is computed in float64 on the CPU. n is the number of generated samples, D the width of a feature.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SPLITS = 48               # random partitions behind each point of the extrapolation
RESAMPLES = 200
KID_BLOCK = 1000


@dataclass(frozen=True)
class Moments:
    """count, mean (D,) and unbiased covariance (D, D) of a set of features, float64."""

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """features: (n, D)."""
        x = features.double().cpu()
        centred = x - x.mean(0)
        return cls(len(x), x.mean(0), centred.T @ centred / (len(x) - 1))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        n, gap = self.count + other.count, self.mean - other.mean
        mean = (self.count * self.mean + other.count * other.mean) / n
        scatter = (self.count - 1) * self.covariance + (other.count - 1) * other.covariance
        return Moments(n, mean, (scatter + torch.outer(gap, gap) * self.count * other.count / n) / (n - 1))

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(mean: Tensor, covariance: Tensor, reference: Moments) -> Tensor:
    """|m - m_r|^2 + tr(S + S_r - 2 (S_r^1/2 S S_r^1/2)^1/2), Dowson & Landau 1982. mean (..., D) -> (...)."""
    cross = torch.linalg.eigvalsh(reference.root @ covariance @ reference.root).clamp(min=0).sqrt().sum(-1)
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + reference.covariance.trace()
    return (mean - reference.mean).square().sum(-1) + trace - 2 * cross


@dataclass(frozen=True)
class Reference:
    """Moments of the reference in two independent halves: they tell how much its finite size adds to a distance.

    subset: (m, D) float32, features of some of its members, for the distances that need samples.
    """

    halves: tuple[Moments, Moments]
    subset: Tensor

    @cached_property
    def whole(self) -> Moments:
        return self.halves[0] + self.halves[1]


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float


def least_samples(dim: int) -> int:
    """Fewer leave the thirds, whose covariances enter the extrapolation, without full rank."""
    return 3 * (dim + 1)


def frechet_infinity(features: Tensor, reference: Reference, seed: int = 0) -> Estimate:
    """The Fréchet distance at infinitely many samples, with an interval that holds it in about 95 of 100 repetitions.

    Chong & Forsyth 2020, arXiv:1911.07023: the plug-in distance of n samples is too large by c / n + O(1 / n^2). The
    points are the averages over random partitions into 1, 2 and 3 equal parts; the parabola in 1 / n through them
    has the value 3 f(n) - 3 f(n / 2) + f(n / 3) at 1 / n = 0. The reference's own c / N is removed alike, by halves.
    May be slightly negative where the truth is 0. features: (n, D) with n >= least_samples(D).
    """
    x = features.double().cpu()
    if len(x) < least_samples(x.shape[1]):
        raise ValueError(f"{len(x)} samples are too few for {x.shape[1]} dimensions: it takes {least_samples(x.shape[1])}")
    generator = torch.Generator().manual_seed(seed)
    here = Moments.of(x)
    plug_in = frechet(here.mean, here.covariance, reference.whole)
    halves, thirds = (_partitioned(x, parts, reference.whole, generator) for parts in (2, 3))
    finite = sum(frechet(here.mean, here.covariance, half) for half in reference.halves) / 2 - plug_in
    value = (3 * plug_in - 3 * halves + thirds - finite).item()
    margin = 1.96 * _deviation(x, here, reference.whole, generator)
    return Estimate(value, value - margin, value + margin)


def _partitioned(x: Tensor, parts: int, reference: Moments, generator: torch.Generator) -> Tensor:
    """The mean plug-in distance of n / parts samples, over random partitions of x."""
    size, distances = len(x) // parts, []
    for _ in range(SPLITS):
        order = torch.randperm(len(x), generator=generator)[: size * parts]
        piece = x[order].reshape(parts, size, -1)
        mean = piece.mean(1)
        centred = piece - mean[:, None]
        distances.append(frechet(mean, centred.mT @ centred / (size - 1), reference).mean())
    return torch.stack(distances).mean()


def _deviation(x: Tensor, here: Moments, reference: Moments, generator: torch.Generator) -> float:
    """Standard deviation of the distance by the bootstrap, corrected where the distance is near 0.

    The distance's variance has a linear part L and a quadratic part Q. Around the sample, which lies off the
    reference by chance even if the truth does not, the linear part reads L + 2 Q: the bootstrap gives L + 3 Q, and
    the influence function L + 2 Q. Twice the second less the first is L + Q, never below a third of the bootstrap.
    """
    distances = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(len(x), (len(x),), generator=generator)
        weight = torch.bincount(drawn, minlength=len(x)).double()
        mean = weight @ x / len(x)
        centred = x - mean
        distances.append(frechet(mean, (centred * weight[:, None]).T @ centred / (len(x) - 1), reference))
    bootstrap = torch.stack(distances).var()
    return torch.maximum(2 * _influence_variance(x, here, reference) - bootstrap, bootstrap / 3).sqrt().item()


def _influence_variance(x: Tensor, here: Moments, reference: Moments) -> Tensor:
    """Var(f'(x)) / n for the derivative f'(x) = 2 (m - m_r) . (x - m) + (x - m)^T (1 - T) (x - m) of the distance.

    T = S_r^1/2 (S_r^1/2 S S_r^1/2)^-1/2 S_r^1/2 is the optimal transport map between the two Gaussians.
    """
    values, vectors = torch.linalg.eigh(reference.root @ here.covariance @ reference.root)
    inverse = torch.where(values > 1e-12 * values[-1], values, torch.inf).rsqrt()
    transport = reference.root @ (vectors * inverse) @ vectors.T @ reference.root
    centred = x - here.mean
    slope = centred - centred @ transport
    return (2 * centred @ (here.mean - reference.mean) + (slope * centred).sum(1)).var() / len(x)


def kid(features: Tensor, subset: Tensor) -> float:
    """Unbiased squared MMD under the kernel (x . y / D + 1)^3, Bińkowski et al. 2018, arXiv:1801.01401.

    The mean over disjoint blocks of up to 1,000 generated features, (n, D), against blocks of the reference's subset.
    """
    x, y = features.double().cpu(), subset.double().cpu()
    blocks = [block for block in x.split(KID_BLOCK) if 2 * len(block) >= min(len(x), KID_BLOCK)]
    others = [block for block in y.split(KID_BLOCK) if len(block) > 1]
    return sum(_mmd(block, others[i % len(others)]) for i, block in enumerate(blocks)) / len(blocks)


def _mmd(x: Tensor, y: Tensor) -> float:
    kernel = lambda a, b: (a @ b.T / x.shape[1] + 1) ** 3
    within = lambda a: (kernel(a, a).sum() - kernel(a, a).diagonal().sum()) / (len(a) * (len(a) - 1))
    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def precision_recall(features: Tensor, subset: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of generated features inside the reference's manifold, and the reverse; Kynkäänniemi et al. 2019, arXiv:1904.06991.

    A manifold is the union of balls around its members, each reaching to the k-th nearest other. Both sides are cut
    to the same count, since the figures depend on it.
    """
    m = min(len(features), len(subset))
    x, y = features[:m].double().cpu(), subset[:m].double().cpu()
    return _inside(x, y, k), _inside(y, x, k)


def _inside(x: Tensor, manifold: Tensor, k: int) -> float:
    radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values        # the nearest is the member itself
    return (torch.cdist(x, manifold) <= radius).any(1).double().mean().item()


def diversity(groups: Tensor) -> float:
    """Mean distance between two samples of the same prompt. groups: (prompts, samples of each, D)."""
    x = groups.double().cpu()
    k = x.shape[1]
    return (torch.cdist(x, x).sum() / (len(x) * k * (k - 1))).item()
