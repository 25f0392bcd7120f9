"""Random draws as functions: of (seed, step, update, repeat, name, sample id), never of a state.

Inserting a draw shifts no other, five critic repeats see five noises, and ranks and micro-batches draw what the
joined batch would have drawn for their samples.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def key(*parts: object) -> int:
    """A 63-bit seed, a function of its parts alone: the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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
        return self._each(name, lambda g: torch.randn(shape, generator=g)).to(self.device)

    def uniform(self, name: str) -> Tensor:
        """Uniform in [0, 1), (B,) float64 on the CPU."""
        return self._each(name, lambda g: torch.rand((), generator=g, dtype=torch.float64))

    def integers(self, name: str, high: int) -> Tensor:
        """Uniform on 0 .. high - 1, (B,) int64 on the CPU."""
        return self._each(name, lambda g: torch.randint(high, (), generator=g))

    def shared(self, name: str) -> float:
        """Uniform in [0, 1), one number for the whole joined batch: equal on all ranks and micro-batches."""
        return torch.rand((), generator=self._generator(name, "shared"), dtype=torch.float64).item()

    def _generator(self, name: str, sample: object) -> torch.Generator:
        return torch.Generator().manual_seed(key(self.seed, self.index, self.update, self.repeat, name, sample))

    def _each(self, name: str, draw) -> Tensor:
        return torch.stack([draw(self._generator(name, sample)) for sample in self.ids.tolist()])
