"""How far two sets of features cover each other, by balls around their members.

Everything is computed in float64 on the CPU. A figure depends on how many members both sets have, and so does the truth
that its interval is about.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .estimate import Estimate, jackknife, student

# of the jackknife; neighbours kept beyond the k-th, in case that a block takes some away
BLOCKS, SPARE = 20, 40


def manifolds(features: Tensor, subset: Tensor, k: int = 3, k_dense: int = 5) -> dict[str, Estimate]:
    """precision, recall, density and coverage of generated features (n, D) against the reference's (m, D).

    Precision: the share of generated features within the reference's manifold, the union of balls around its members
    that reach to the k-th nearest other; recall: the reverse (Kynkäänniemi et al. 2019, arXiv:1904.06991). Density: in
    how many of the reference's balls a generated feature lies, over k; coverage: the share of the reference's balls
    that hold a generated feature (Naeem et al. 2020, arXiv:2002.09797), both with k_dense. Both sides are cut to the
    same count, at least k_dense + 2. Density may exceed 1; the intervals of the others end at 0 and 1. Intervals are
    the jackknife's over both sides, which errs on the wide side (Efron & Stein 1981): up to twice for coverage near 1.
    """
    count = min(len(features), len(subset))
    x, y = features[:count].double().cpu(), subset[:count].double().cpu()
    between = torch.cdist(x, y)
    blocks = torch.arange(count) * min(BLOCKS, count) // count
    near_x, near_y = (_Neighbours(side, k_dense + SPARE, blocks) for side in (x, y))
    every = torch.ones(count, dtype=torch.bool)
    whole = _figures(between, near_x.radius(k, None), near_y.radius(k, None), near_y.radius(k_dense, None), k_dense)
    without: list[list[Tensor]] = [[], []]
    for block in range(int(blocks[-1]) + 1):
        kept = blocks != block
        for side, (rows, columns) in enumerate(((kept, every), (every, kept))):
            radii = (near_x.radius(k, None if side else block)[rows],
                     *(near_y.radius(reach, block if side else None)[columns] for reach in (k, k_dense)))
            without[side].append(_figures(between[rows][:, columns], *radii, k_dense))
    half = student(int(blocks[-1])) * jackknife([torch.stack(side) for side in without]).sqrt()
    low, high = (whole - half).clamp(min=0), whole + half
    high[[0, 1, 3]] = high[[0, 1, 3]].clamp(max=1)
    names = ("precision", "recall", "density", "coverage")
    return {name: Estimate(*(numbers[i].item() for numbers in (whole, low, high))) for i, name in enumerate(names)}


class _Neighbours:
    """The nearest others of each member (n, kept), in ascending order, with the blocks that they belong to."""

    def __init__(self, members: Tensor, kept: int, blocks: Tensor) -> None:
        found = torch.cdist(members, members).fill_diagonal_(torch.inf).topk(min(kept, len(members) - 1), largest=False)
        self.distances, self.blocks = found.values, blocks[found.indices]

    def radius(self, k: int, block: int | None) -> Tensor:
        """To the k-th nearest other that is not of this block: (n,)."""
        left = self.distances if block is None else self.distances.masked_fill(self.blocks == block, torch.inf)
        return left.kthvalue(k, dim=1).values


def _figures(between: Tensor, reach_x: Tensor, reach_y: Tensor, dense_y: Tensor, k_dense: int) -> Tensor:
    """(4,). between (n, m): distances; reach_x (n,), reach_y (m,), dense_y (m,): radii."""
    figures = ((between <= reach_y).any(1), (between <= reach_x[:, None]).any(0),
               (between <= dense_y).sum(1) / k_dense, between.min(0).values <= dense_y)
    return torch.stack([figure.double().mean() for figure in figures])
