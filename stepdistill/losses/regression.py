"""Distances between tensors, one number a sample. All take (B, ...) and return (B,): the mean over all other axes."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

DistanceName = Literal["squared", "huber"]
DISTANCES: tuple[str, ...] = get_args(DistanceName)


def squared(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference."""
    return (x - y).square().flatten(1).mean(1)


def norm(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square difference: the Euclidean norm, free of the sample's size. Its gradient is of one length
    wherever x and y differ, and 0 where they do not."""
    difference = (x - y).flatten(1)
    return torch.linalg.vector_norm(difference, dim=1) / difference.shape[1] ** 0.5


def absolute(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (x - y).abs().flatten(1).mean(1)


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Mean over elements of sqrt(d^2 + c^2) - c: d^2 / 2c where |d| is far below c, |d| - c where far above.

    The per-element form of the scripts that train LCMs, with c = 0.001. `whole_huber` is the paper's that had it first.
    """
    return ((x - y).square().add(c * c).sqrt() - c).flatten(1).mean(1)


def whole_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """sqrt(m + c^2) - c, m the mean squared difference of a sample: m / 2c where sqrt(m) is far below c, `norm` where
    far above.

    Song & Dhariwal 2023, arXiv:2310.14189, section 3.3: sqrt(|x - y|^2 + k^2) - k of a whole sample of d numbers, whose
    k they let grow as sqrt(d). Over sqrt(d) that is this one, with c = k / sqrt(d).
    """
    return (squared(x, y) + c * c).sqrt() - c


def distance(name: DistanceName, huber_c: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`squared`, or `pseudo_huber` with c = huber_c. KeyError for any other name."""
    return {"squared": squared, "huber": partial(pseudo_huber, c=huber_c)}[name]
