"""The records that pass between layers: a condition, a batch, and what a role is."""
from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Callable, Iterator, Protocol

import torch
from torch import Tensor

from .prediction import Prediction
from .schedule import Schedule, moved


@dataclass(frozen=True)
class Condition:
    """What a network is told beside x_t and t. Every tensor has the batch as its first axis.

    text (B, L, D), mask (B, L), pooled (B, D), time_ids (B, 6), label (B,) int64,
    w (B,) the guidance scale told to a student (1 is conditional only), or to a critic the exit of a sample (1 is the first),
    r (B,) the time to land on, in [0, 1];
    null is the unconditional counterpart that guidance subtracts.
    """

    text: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    label: Tensor | None = None
    w: Tensor | None = None
    r: Tensor | None = None
    null: Condition | None = None

    def replace(self, **changes: Any) -> Condition:
        return replace(self, **changes)

    def map(self, f: Callable[[Tensor], Tensor]) -> Condition:
        """The same record with f applied to every tensor, those of `null` too."""
        return Condition(**{name: f(value) if isinstance(value, Tensor) else value.map(f) for name, value in self._items()})

    def __getitem__(self, index: Any) -> Condition:
        return self.map(lambda tensor: tensor[index])

    def dropped(self, chosen: Tensor) -> Condition:
        """Unconditional where chosen, (B,) bool. ValueError without a `null`."""
        if self.null is None:
            raise ValueError("conditions can be dropped only where cond.null says what stands in for them")
        changed = {name: torch.where(moved(chosen, value.device).reshape(-1, *[1] * (value.ndim - 1)), getattr(self.null, name), value)
                   for name, value in self._items() if getattr(self.null, name) is not None}
        return replace(self, **changed)

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def __len__(self) -> int:
        return len(next(value for _, value in self._items() if isinstance(value, Tensor)))

    @staticmethod
    def cat(parts: list[Condition]) -> Condition:
        """Joins along the batch. All parts must hold the same fields; `null` is joined where every part has one."""
        names = [{name for name, _ in part._items() if name != "null"} for part in parts]
        if any(n != names[0] for n in names):
            raise ValueError(f"conditions of different make cannot be joined: {[sorted(n) for n in names]}")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names[0]}
        nulls = [part.null for part in parts if part.null is not None]
        return Condition(**joined, null=Condition.cat(nulls) if len(nulls) == len(parts) else None)

    def _items(self) -> Iterator[tuple[str, Any]]:
        return ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None)


@dataclass(frozen=True)
class Pairs:
    """Noises, and states of the teacher's way from each to the data by a deterministic solver.

    noise (B, ...): the state at t = 1, unit normal. nodes (B, n, ...): the states at `times`, the last the teacher's sample.
    times (B, n) float64, descending, evenly spaced, the last 0; they stay on the CPU, as times do.
    """

    noise: Tensor
    nodes: Tensor
    times: Tensor

    def to(self, *args: Any, **kwargs: Any) -> Pairs:
        """The states moved."""
        return replace(self, noise=self.noise.to(*args, **kwargs), nodes=self.nodes.to(*args, **kwargs))


@dataclass(frozen=True)
class Batch:
    """A slice of one joined batch.

    ids (B,) int64, distinct within the joined batch: the key of every per-sample draw.
    x0 (B, ...) scaled latents, or None where the data are prompts only. cond: the batch's conditions. shape: of one
    sample, which x0 tells where there is one. pairs: where the data are the teacher's pairs; x0 is then their last node.
    """

    ids: Tensor
    cond: Condition
    x0: Tensor | None = None
    shape: tuple[int, ...] | None = None
    pairs: Pairs | None = None

    def __post_init__(self) -> None:
        if self.x0 is not None:
            object.__setattr__(self, "shape", tuple(self.x0.shape[1:]))

    def __len__(self) -> int:
        return len(self.ids)


class Role(Protocol):
    """A network, an adapter on one, or a closed form: role(x_t, t, cond) -> Prediction. Nothing else is public.

    x_t: (B, ...); t: (B,) float64 in [0, 1], from data to noise.
    """

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction: ...
