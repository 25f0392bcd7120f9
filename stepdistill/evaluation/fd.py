"""Distances between sets of features, each checked against a known truth in tests/evaluation/test_fd.py.

Everything is computed in float64 on the CPU. n is the number of generated samples, D the width of a feature.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from .estimate import Estimate, Z

CHUNK = 1024              # samples worked on at a time
SPLITS = 48               # random partitions behind each point of the extrapolation
RESAMPLES = 200
BLOCKS, LEFT_OUT, ORDERS = 10, (1, 2, 3), 4      # of a small reference: tenths, of which one to three are left out, in
                                                 # random orders


@dataclass(frozen=True)
class Moments:
    """count, mean (D,) and unbiased covariance (D, D) of a set of features, float64."""

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """features: (n, D)."""
        x = features.cpu()
        return cls(len(x), *_moments(x, len(x) - 1))

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


def _moments(x: Tensor, over: int, rows: Tensor | None = None, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), float64, of these rows of x (n, D), each counted `weight` times (len(rows),);
    the scatter is divided by `over`. In chunks: fifty thousand samples take little more memory than they lie in."""
    rows = torch.arange(len(x)) if rows is None else rows
    weight = torch.ones(len(rows), dtype=torch.float64) if weight is None else weight
    chunks = list(zip(rows.split(CHUNK), weight.split(CHUNK), strict=True))
    mean = sum((w @ x[some].double() for some, w in chunks), torch.zeros((), dtype=torch.float64)) / weight.sum()
    scatter = torch.zeros((), dtype=torch.float64)
    for some, w in chunks:
        centred = x[some].double() - mean
        scatter = scatter + (centred * w[:, None]).T @ centred
    return mean, scatter / over


def frechet(mean: Tensor, covariance: Tensor, reference: Moments) -> Tensor:
    """|m - m_r|^2 + tr(S + S_r - 2 (S_r^1/2 S S_r^1/2)^1/2), Dowson & Landau 1982. mean (..., D) -> (...)."""
    cross = torch.linalg.eigvalsh(reference.root @ covariance @ reference.root).clamp(min=0).sqrt().sum(-1)
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + reference.covariance.trace()
    return (mean - reference.mean).square().sum(-1) + trace - 2 * cross


@dataclass(frozen=True)
class Reference:
    """Moments of the reference in two independent halves: they tell how much its finite size adds to a distance.

    subset: (m, D) float32, features of some of its members, or of all where they are few, for what needs samples.
    """

    halves: tuple[Moments, Moments]
    subset: Tensor

    @cached_property
    def whole(self) -> Moments:
        return self.halves[0] + self.halves[1]

    @property
    def complete(self) -> bool:
        """Whether the subset is all there is."""
        return len(self.subset) == self.whole.count


def least_samples(dim: int) -> int:
    """Fewer leave the thirds, whose covariances enter the extrapolation, without full rank."""
    return 3 * (dim + 1)


def too_few(samples: int, pictures: int, dim: int) -> str | None:
    """Why no Fréchet distance in `dim` dimensions is taken of so many samples against so many pictures; None where it
    is."""
    if samples < least_samples(dim):
        return (f"{samples:,} samples are too few for a Fréchet distance in {dim:,} dimensions, which takes at "
                f"least {least_samples(dim):,}")
    if pictures < 2 * (dim + 1):             # the covariances of the reference's halves
        return (f"{pictures:,} pictures of the reference are too few for a Fréchet distance in {dim:,} dimensions, "
                f"which takes at least {2 * (dim + 1):,}, better 10,000")
    return None


def frechet_infinity(features: Tensor, reference: Reference, seed: int = 0) -> Estimate:
    """The Fréchet distance at infinitely many samples of both sides, with an interval that holds it in about 95 of 100
    repetitions.

    Chong & Forsyth 2020, arXiv:1911.07023: the plug-in distance of n samples is too large by c / n + O(1 / n^2). The
    points are the averages over random partitions into 1, 2 and 3 equal parts; the parabola in 1 / n through them
    has the value 3 f(n) - 3 f(n / 2) + f(n / 3) at 1 / n = 0. What the reference's own size adds is removed too, see
    `_surplus`. May be slightly negative where the truth is 0.

    The interval. The estimate is a function of two independent sets, n samples x and N pictures y of the reference. Its
    first-order expansion about the two laws P and R (von Mises 1947) is f(P, R) + mean a(x) + mean b(y), with a and b
    the derivatives of the distance towards a point of either law. As the sets are independent, its variance is Var a /
    n + Var b / N. The distance is symmetric in its two Gaussians, so b is a with their places exchanged: one formula,
    `_influence_variance`, gives both, of the reference from the subset of its features that is kept. The share of the
    samples is corrected where the distance is near 0, see `_variance`; that of the reference is left as it is, which is
    too wide there by its quadratic part rather than too narrow. Held of 60 repetitions each, at three distances against
    130 to 2,000 pictures: 56 to 60 (scripts/check_interval.py). features: (n, D) with n >= least_samples(D).
    """
    x = features.cpu()
    if len(x) < least_samples(x.shape[1]):
        raise ValueError(f"{len(x)} samples are too few for {x.shape[1]} dimensions: it takes "
                         f"{least_samples(x.shape[1])}")
    generator = torch.Generator().manual_seed(seed)
    here = Moments.of(x)
    plug_in = frechet(here.mean, here.covariance, reference.whole)
    halves, thirds = (_partitioned(x, parts, reference.whole, generator) for parts in (2, 3))
    value = (3 * plug_in - 3 * halves + thirds - _surplus(reference, here, plug_in, generator)).item()
    y = reference.subset.cpu()
    by_reference = _influence_variance(y, reference.whole, here).item() / reference.whole.count
    margin = Z * (_variance(x, here, reference.whole, generator) + by_reference) ** 0.5
    return Estimate(value, value - margin, value + margin)


def _surplus(reference: Reference, here: Moments, plug_in: Tensor, generator: torch.Generator) -> Tensor:
    """What the reference's finite size N adds to the plug-in distance.

    A large one: c / N, from its halves. Where it is so small that its features are all at hand, terms to 1 / N^3: the
    generalised jackknife (Schucany, Gray & Owen 1971) of orders 1 to 3, over tenths of it. All choices of the tenths to
    leave out count alike, so the chance of the pictures cancels in the differences.
    """
    if not reference.complete:
        return sum(frechet(here.mean, here.covariance, half) for half in reference.halves) / 2 - plug_in
    y = reference.subset.double().cpu()
    orders = [y[torch.randperm(len(y), generator=generator)].tensor_split(BLOCKS) for _ in range(ORDERS)]
    points = [(len(y), plug_in)] + [_without(orders, count, here) for count in LEFT_OUT]
    return plug_in - _at_infinity(points)


def _without(orders: Sequence[Sequence[Tensor]], count: int, other: Moments) -> tuple[float, Tensor]:
    """The mean size of what is left, and its mean plug-in distance to `other`, over all ways to leave out `count`
    blocks."""
    out = torch.tensor(list(combinations(range(BLOCKS), count)))
    sizes, distances = [], []
    for blocks in orders:
        number = torch.tensor([len(block) for block in blocks], dtype=torch.float64)
        sums = torch.stack([block.sum(0) for block in blocks])
        squares = torch.stack([block.T @ block for block in blocks])
        left, total, square = (whole.sum(0) - whole[out].sum(1) for whole in (number, sums, squares))
        mean = total / left[:, None]
        scatter = square - left[:, None, None] * mean[:, :, None] * mean[:, None, :]
        distances.append(frechet(mean, scatter / (left - 1)[:, None, None], other).mean())
        sizes.append(left.mean().item())
    return sum(sizes) / len(sizes), torch.stack(distances).mean()


def _at_infinity(points: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The polynomial in 1 / n through the points (n, value), at 1 / n = 0."""
    total = torch.zeros((), dtype=torch.float64)
    for n, value in points:
        weight = 1.0
        for other, _ in points:
            weight *= 1.0 if other == n else n / (n - other)
        total += weight * value
    return total


def _partitioned(x: Tensor, parts: int, reference: Moments, generator: torch.Generator) -> Tensor:
    """The mean plug-in distance of n / parts samples, over random partitions of x."""
    size, distances = len(x) // parts, []
    for _ in range(SPLITS):
        order = torch.randperm(len(x), generator=generator)[: size * parts]
        pieces = [_moments(x, size - 1, piece) for piece in order.split(size)]
        means, covariances = map(torch.stack, zip(*pieces, strict=True))
        distances.append(frechet(means, covariances, reference).mean())
    return torch.stack(distances).mean()


def _variance(x: Tensor, here: Moments, reference: Moments, generator: torch.Generator) -> float:
    """Of the distance, by the samples: from the bootstrap, corrected where the distance is near 0.

    The distance's variance has a linear part L and a quadratic part Q. Around the sample, which lies off the
    reference by chance even if the truth does not, the linear part reads L + 2 Q: the bootstrap gives L + 3 Q, and
    the influence function L + 2 Q. Twice the second less the first is L + Q, never below a third of the bootstrap.
    """
    distances = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(len(x), (len(x),), generator=generator)
        weight = torch.bincount(drawn, minlength=len(x)).double()
        distances.append(frechet(*_moments(x, len(x) - 1, weight=weight), reference))
    bootstrap = torch.stack(distances).var()
    return torch.maximum(2 * _influence_variance(x, here, reference) / len(x) - bootstrap, bootstrap / 3).item()


def _influence_variance(x: Tensor, here: Moments, reference: Moments) -> Tensor:
    """Var(f'(x)), n times the distance's by n of x, for the derivatives f' of `slopes`."""
    return slopes(x, here, reference).var()


def slopes(x: Tensor, here: Moments, reference: Moments) -> Tensor:
    """The derivative of the distance between two laws towards each point of the first, up to a constant: (n,) float64.

    f'(x) = 2 (m - m_r) . (x - m) + (x - m)^T (1 - T) (x - m). x (n, D), of which `here` are the moments.

    T = S_r^1/2 (S_r^1/2 S S_r^1/2)^-1/2 S_r^1/2 is the optimal transport map between the two Gaussians.
    """
    values, vectors = torch.linalg.eigh(reference.root @ here.covariance @ reference.root)
    inverse = torch.where(values > 1e-12 * values[-1], values, torch.inf).rsqrt()
    transport = reference.root @ (vectors * inverse) @ vectors.T @ reference.root
    found = []
    for rows in x.cpu().split(CHUNK):
        centred = rows.double() - here.mean
        slope = centred - centred @ transport
        found.append(2 * centred @ (here.mean - reference.mean) + (slope * centred).sum(1))
    return torch.cat(found)
