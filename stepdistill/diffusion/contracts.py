"""The records that pass between layers: a condition, a batch, and what a role is."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Callable, Iterator, Protocol

import torch
from torch import Tensor

from ..errors import RequestError
from .prediction import Prediction
from .schedule import Schedule, moved

EXTRAS = ("w", "r")               # of the numbers in Condition.extra, those that can be given and read by name


@dataclass(frozen=True, init=False)
class Condition:
    """What a network reads beside x_t and t. Every tensor has the batch as its first axis.

    text (B, L, D), mask (B, L), pooled (B, D), time_ids (B, 6), label (B,) int64.
    extra: numbers (B,) by name that a student or a critic reads through an embedding of its own: w, the guidance scale
    (1 is conditional only) or a critic's exit (1 is the first), r, the time to land on, in [0, 1], share, of the data
    in a mixture. `Condition(w=...)` and `cond.replace(w=...)` set w and r, None takes them away, and cond.w is None
    where there is none. null is the unconditional counterpart that guidance subtracts; negative, where there is one,
    what it subtracts in its place: the encoding of a negative prompt, or the null's again for samples that have none.
    """

    text: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    label: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    null: Condition | None = None
    negative: Condition | None = None

    def __init__(self, **given: Any) -> None:
        extra = {**given.pop("extra", {}), **{name: given.pop(name) for name in EXTRAS if name in given}}
        if unknown := given.keys() - {f.name for f in fields(self)}:
            raise TypeError(f"a Condition has no {', '.join(sorted(unknown))}; it has "
                            f"{', '.join(f.name for f in fields(self))}")
        for f in fields(self):
            object.__setattr__(self, f.name, given.get(f.name))
        object.__setattr__(self, "extra", {name: value for name, value in extra.items() if value is not None})

    @property
    def w(self) -> Tensor | None:
        return self.extra.get("w")

    @property
    def r(self) -> Tensor | None:
        return self.extra.get("r")

    @property
    def against(self) -> Condition | None:
        """What guidance subtracts: the negative, or the null where there is none."""
        return self.null if self.negative is None else self.negative

    def replace(self, **changes: Any) -> Condition:
        return Condition(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)

    def map(self, f: Callable[[Tensor], Tensor]) -> Condition:
        """The same record with f applied to every tensor, those of `null` and `negative` too."""
        return Condition(**{name: f(value) for name, value in self._tensors()},
                         extra={n: f(v) for n, v in self.extra.items()}, **self.beside(lambda cond: cond.map(f)))

    def beside(self, change: Callable[[Condition], Condition]) -> dict[str, Condition | None]:
        """`null` and `negative` by name, each changed where there is one."""
        return {name: None if cond is None else change(cond) for name, cond in
                (("null", self.null), ("negative", self.negative))}

    def __getitem__(self, index: Any) -> Condition:
        return self.map(lambda tensor: tensor[index])

    def dropped(self, chosen: Tensor) -> Condition:
        """Unconditional where chosen, (B,) bool; extra stays. ValueError without a `null`."""
        if self.null is None:
            raise ValueError("conditions can be dropped only where cond.null says what stands in for them")
        changed = {name: torch.where(moved(chosen, value.device).reshape(-1, *[1] * (value.ndim - 1)),
                                     getattr(self.null, name), value)
                   for name, value in self._tensors() if getattr(self.null, name) is not None}
        return self.replace(**changed)

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def __len__(self) -> int:
        return len(next(value for _, value in (*self._tensors(), *self.extra.items())))

    @staticmethod
    def cat(parts: list[Condition]) -> Condition:
        """Joins along the batch. All parts must hold the same fields; `null` and `negative` are joined where every part
        has one."""
        names = [({name for name, _ in part._tensors()}, part.extra.keys()) for part in parts]
        if any(n != names[0] for n in names):
            raise ValueError("conditions of different make cannot be joined: "
                             f"{[sorted(one | two) for one, two in names]}")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name, _ in parts[0]._tensors()}
        extra = {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra}
        beside = {name: [getattr(part, name) for part in parts] for name in ("null", "negative")}
        return Condition(**joined, extra=extra, **{name: None if None in found else Condition.cat(found)
                                                   for name, found in beside.items()})

    def tensors(self) -> list[Tensor]:
        """All of them but those of `null` and `negative`."""
        return [value for _, value in (*self._tensors(), *self.extra.items())]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((f.name, value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor))


@dataclass(frozen=True)
class Pairs:
    """Noises, and states of the teacher's way from each to the data by a deterministic solver.

    noise (B, ...): the state at t = 1, unit normal. nodes (B, n, ...): the states at `times`, the last the teacher's
    sample. times (B, n) float64, descending, evenly spaced, the last 0; they stay on the CPU, as times do.
    """

    noise: Tensor
    nodes: Tensor
    times: Tensor

    def leg(self, j: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each way the step j, (B,) int64 from 0, of as many even ones: where it begins and lands, (B, ...), and
        when, (B,) float64. RequestError where no such states are kept."""
        every, left = divmod(self.nodes.shape[1], steps)
        if left:
            raise RequestError(f"a student of {steps} steps lands on {steps} evenly spaced states of the teacher's "
                               f"way, and the pairs keep {self.nodes.shape[1]}: data.pairs.nodes should be a multiple "
                               f"of {steps}")
        rows = torch.arange(len(self.noise))
        states = torch.cat([self.noise[:, None], self.nodes[:, every - 1::every].to(self.noise)], 1)
        times = torch.cat([torch.ones(len(rows), 1, dtype=torch.float64), self.times[:, every - 1::every]], 1)
        return states[rows, j], states[rows, j + 1], times[rows, j], times[rows, j + 1]

    def to(self, *args: Any, **kwargs: Any) -> Pairs:
        """The states moved."""
        return replace(self, noise=self.noise.to(*args, **kwargs), nodes=self.nodes.to(*args, **kwargs))


@dataclass(frozen=True)
class Batch:
    """A slice of one joined batch.

    ids (B,) int64, distinct within the joined batch: the key of every per-sample draw.
    x0 (B, ...) scaled latents, or None where the data are prompts only. cond: the batch's conditions. shape: of one
    sample, which x0 tells where there is one. pairs: where the data are the teacher's pairs; x0 is then their last
    node. prompts: the B texts of the conditions, where something reads them.
    """

    ids: Tensor
    cond: Condition
    x0: Tensor | None = None
    shape: tuple[int, ...] | None = None
    pairs: Pairs | None = None
    prompts: Sequence[str] | None = None

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
