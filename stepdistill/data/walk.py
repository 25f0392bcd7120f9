"""Which sample stands at a place of an endless row of shuffles."""
from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .shapes import scatter

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 4


def permuted(positions: Tensor, count: int, seed: int) -> Tensor:
    """The samples at these positions of an endless row of shuffles of 0 .. count - 1, each of its own: (B,) int64.

    A Feistel network on pairs (left, right) of residues, with addition in place of exclusive or: each half round is
    undone by a subtraction, so it is a bijection of the about count + sqrt(count) pairs. What lands outside walks on
    along its cycle until it is inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    position = positions.cpu().numpy().astype(np.uint64)
    with np.errstate(over="ignore"):
        keys = scatter(position // np.uint64(count) * GOLDEN + np.uint64(seed))
        place = _rounds(position % np.uint64(count), keys, count)
        while (outside := place >= count).any():
            place[outside] = _rounds(place[outside], keys[outside], count)
    return torch.from_numpy(place.astype(np.int64))


def _rounds(place: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    lefts = math.isqrt(count - 1) + 1
    rights = -(-count // lefts)
    left, right = np.divmod(place, np.uint64(rights))
    for i in range(ROUNDS):
        left = (left + scatter(keys + (right * np.uint64(2 * ROUNDS) + np.uint64(2 * i + 1)) * GOLDEN) % lefts) % lefts
        right = (right + scatter(keys + (left * np.uint64(2 * ROUNDS) + np.uint64(2 * i + 2))
                                 * GOLDEN) % rights) % rights
    return left * np.uint64(rights) + right
