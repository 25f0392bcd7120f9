"""Random draws as functions: of (seed, step, update, repeat, name, sample id), never of a state.

Inserting a draw shifts no other, five critic repeats see five noises, and ranks and micro-batches draw what the
joined batch would have drawn for their samples. The generator counts: word j of a sample is a hash of the draw's key,
the sample's id and j (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so a batch is drawn at once.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from .schedule import moved


def key(*parts: object) -> int:
    """A 63-bit seed, a function of its parts alone: the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _signed(word: int) -> int:
    """A 64-bit word as int64 holds it."""
    return word - (1 << 64) if word >= 1 << 63 else word


GOLDEN, FIRST, SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


BLOCK = 1 << 15                   # numbers that are drawn at a time: their words stay in a core's own cache


def _right(words: Tensor, n: int) -> Tensor:
    """A shift that fills with zeros; int64's own repeats the sign."""
    return (words >> n).bitwise_and_((1 << (64 - n)) - 1)


def _scatter(words: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place: a bijection of 64-bit words that scatters neighbours (Steele et al. 2014)."""
    words.bitwise_xor_(_right(words, 30)).mul_(FIRST)
    words.bitwise_xor_(_right(words, 27)).mul_(SECOND)
    return words.bitwise_xor_(_right(words, 31))


def fractions(key: int, ids: Tensor, count: int, transform: Callable[[Tensor], Tensor] | None = None,
              dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform in (0, 1), (B, count) float64 on the CPU: a function of (key, id, column). ids (B,) int64.

    transform: applied to each of them, in float64; the results are kept in `dtype`.
    """
    rows = _scatter(_scatter(ids.cpu() * GOLDEN + key) + GOLDEN)[:, None]
    columns = torch.arange(1, count + 1) * GOLDEN
    drawn = torch.empty(len(ids), count, dtype=dtype)
    width = max(1, BLOCK // max(1, len(ids)))
    for piece, column in zip(drawn.split(width, 1), columns.split(width), strict=True):
        uniform = _right(_scatter(rows + column), 12).double().add_(0.5).mul_(2.0**-52)
        piece.copy_(uniform if transform is None else transform(uniform))
    return drawn


@dataclass(frozen=True)
class Step:
    """What a loss may ask of its moment in training.

    index counts training steps from 0; progress = index / total is in [0, 1). ids (B,) int64 name the samples of the
    slice at hand. All draws are made on the CPU; noise moves to `device`, and what becomes a time stays, as times do.
    kept: what a loss leaves for the updates that share its batch, such as a sample that was dear to make.
    """

    seed: int
    index: int
    progress: float
    update: str
    repeat: int
    ids: Tensor
    device: torch.device | str = "cpu"
    kept: dict[str, Any] = field(default_factory=dict, compare=False)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal, (B, *shape) float32 on `device`: `shape` is that of one sample."""
        drawn = fractions(self._key(name), self.ids, prod(shape), torch.special.ndtri, torch.float32)
        return moved(drawn.reshape(-1, *shape), self.device)

    def uniform(self, name: str) -> Tensor:
        """Uniform in (0, 1), (B,) float64 on the CPU."""
        return fractions(self._key(name), self.ids, 1)[:, 0]

    def integers(self, name: str, high: int) -> Tensor:
        """Uniform on 0 .. high - 1, (B,) int64 on the CPU."""
        return (self.uniform(name) * high).long()

    def shared(self, name: str) -> float:
        """Uniform in (0, 1), one number for the whole joined batch: equal on all ranks and micro-batches."""
        return fractions(self._key(name, "shared"), torch.zeros(1, dtype=torch.int64), 1).item()

    @contextmanager
    def same_dropout(self, name: str) -> Iterator[None]:
        """Passes under one name drop the same units: the global generators, of which dropout draws, begin at one place
        for each, and stand afterwards where they stood before."""
        cuda = torch.device(self.device).type == "cuda"
        with torch.random.fork_rng([self.device] if cuda else []):
            seed = key(self._key(name, "dropout"), self.ids[0].item())      # micro-batches have masks of their own
            torch.default_generator.manual_seed(seed)
            if cuda:
                torch.cuda.manual_seed(seed)
            yield

    def _key(self, *name: str) -> int:
        return key(self.seed, self.index, self.update, self.repeat, *name)
