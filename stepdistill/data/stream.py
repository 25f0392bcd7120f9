"""Which samples each moment of training sees: a function of the seed, never of a state."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.contracts import Batch
from ..diffusion.draws import fractions, key
from ..errors import RequestError
from .datasets import Dataset
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


@dataclass(frozen=True)
class Stream:
    """Batches of `global_batch` samples over all ranks and micro-batches.

    Every (update, repeat) walks through the data by itself, so that a critic and a student do not see the same samples.
    A finite dataset is walked epoch by epoch, each a new permutation; an endless one through consecutive indices.
    shape: of one sample, for data that are prompts only. caption_dropout: the share of samples that are shown without
    their captions, drawn anew for each visit.
    """

    dataset: Dataset
    global_batch: int
    seed: int
    shape: tuple[int, ...] | None = None
    caption_dropout: float = 0.0

    def batch(self, step: int, update: str, repeat: int = 0, rank: int = 0, world: int = 1, micro: int = 0,
              micros: int = 1) -> Batch:
        """Micro-batch `micro` of rank `rank`: a slice of the joined batch, which is the same however it is sliced.

        ids are positions in the walk: distinct within the joined batch, even where it holds a sample twice.
        """
        parts = world * micros
        if self.global_batch % parts:
            raise RequestError(f"data.batch is {self.global_batch}, which {world} processes x {micros} micro-batches "
                               "do not divide. "
                               f"Take a multiple of {parts}, or change train.accumulate.")
        size = self.global_batch // parts
        ids = step * self.global_batch + (rank * micros + micro) * size + torch.arange(size)
        walk = key(self.seed, "data", update, repeat)
        count = self.dataset.count
        indices = ids + (walk >> 2) if count is None else permuted(ids, count, walk)
        x0, cond = self.dataset[indices]
        if self.caption_dropout:
            cond = cond.dropped(fractions(key(walk, "caption dropout"), ids, 1)[:, 0] < self.caption_dropout)
        return Batch(ids, cond, x0, self.shape, self.dataset.pairs(indices))
