"""Guidance as a role made of a role: whatever takes a teacher takes a guided one."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .contracts import Condition, Role
from .draws import Step
from .prediction import Prediction
from .schedule import like
from .wrapper import Wrapper


def _scales(w: float | Tensor, batch: int) -> Tensor:
    return (w if isinstance(w, Tensor) else torch.tensor(w, dtype=torch.float64)).expand(batch)


def with_scale(cond: Condition | None, w: float | Tensor) -> Condition:
    """The condition, its null and its negative, with a scale or (B,) of them for a role that reads it. Like times,
    scales are float64 and stay on the CPU."""
    if cond is None:
        raise ValueError("a guidance scale goes into a condition, and there is none")
    beside = cond.beside(lambda one: with_scale(one, w))
    return cond.replace(w=torch.as_tensor(w, dtype=torch.float64).expand(len(cond)), **beside)


def with_share(cond: Condition, share: Tensor) -> Condition:
    """The condition with the share of data in a mixture, (B,) float64, for a critic that reads it."""
    return cond.replace(extra={**cond.extra, "share": share})


@dataclass(frozen=True)
class SelfGuided(Wrapper):
    """See `self_guided`. w: the scale that it reads, where it has a guidance embedding."""

    guidance_embedding: bool
    w: float | Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        return self.role(x_t, t, cond if not self.guidance_embedding or self.w is None else with_scale(cond, self.w))


def self_guided(role: Role, guidance_embedding: bool) -> Role:
    """A role that has its guidance within, as a student of a guided teacher has: `guided` does not guide it again. It
    passes on the scale to a role with a guidance embedding, and leaves any other as it is."""
    return SelfGuided(role, guidance_embedding)


@dataclass(frozen=True)
class Guided(Wrapper):
    """See `guided`."""

    w: float | Tensor
    interval: tuple[float, float] | None

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        if cond is None or cond.against is None:
            raise ValueError("guidance needs the unconditional counterpart of the condition: set cond.null, or guide "
                             "with w = 1")
        w = _scales(self.w, len(t))
        if self.interval is not None:
            low, high = self.interval
            inside = (low <= t) & (t <= high)
            if not inside.any():
                return self.role(x_t, t, cond)
            w = torch.where(inside.to(w.device), w, 1.0)
        halves = [cond.against.replace(extra=cond.extra), cond.replace(null=None, negative=None)]
        both = self.role(torch.cat([x_t, x_t]), torch.cat([t, t]), Condition.cat(halves))
        without, given = both.raw.chunk(2)
        return replace(both, raw=both.combine(given, without, like(w, given)), x_t=x_t, t=t)


@dataclass(frozen=True)
class Unprompted(Wrapper):
    """A role that reads what guidance subtracts, whatever the prompt."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        if cond is None or cond.against is None:
            raise ValueError("guidance at 0 reads the unconditional counterpart of the condition alone: set cond.null")
        return self.role(x_t, t, cond.against.replace(extra=cond.extra))


def guided(role: Role, w: float | Tensor, interval: tuple[float, float] | None = None) -> Role:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): raw = raw_null + w (raw_cond - raw_null), away
    from the condition's negative where it has one.

    w: one scale or (B,) of them; 1 is conditional only, and the float 1 gives the role unguided; 0 is unconditional,
    and the float 0 asks for nothing else. Outside the interval
    of t (Kynkäänniemi et al. 2024, arXiv:2404.07724) w counts as 1. One call of the network on a doubled batch. Mixing
    raw outputs mixes every view alike, since views are linear at one x_t and t; a pipeline that mixes otherwise says so
    in the prediction's `combine`.

    It looks through every `Wrapper`: guided(viewed(r)) is viewed(guided(r)), so that a network's own outputs are mixed,
    and a `self_guided` role is never guided again, wherever it lies: it reads w, or stays as it is. ValueError for a
    role that `guided` has guided already, and for an interval where the guidance lies within.
    """
    if isinstance(role, SelfGuided):
        if interval is not None:
            raise ValueError("a role that has its guidance within has it at all times: leave the interval out")
        return replace(role, w=w)
    if isinstance(w, (int, float)) and w == 1 and not isinstance(role, Wrapper):
        return role
    if isinstance(role, Guided | Unprompted):
        w = role.w if isinstance(role, Guided) else 0
        raise ValueError(f"this role is guided already, at w = {w}: guide the role that it was made of, once")
    if isinstance(role, Wrapper):
        ends = None if interval is None else torch.tensor(interval, dtype=torch.float64)
        inner = None if ends is None else tuple(role.inner_time(ends).tolist())
        return role.over(lambda wrapped: guided(wrapped, w, inner))
    if isinstance(w, (int, float)) and w == 0 and interval is None:
        return Unprompted(role)
    return Guided(role, w, interval)


@dataclass(frozen=True)
class Autoguided(Wrapper):
    """See `autoguided`."""

    bad: Role
    w: float | Tensor

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        good, bad = self.role(x_t, t, cond), self.bad(x_t, t, cond)
        w = like(_scales(self.w, len(t)), x_t)
        away = bad.view(good.kind)
        return replace(good, raw=away + w * (good.raw - away))


def autoguided(role: Role, bad: Role, w: float | Tensor) -> Role:
    """Karras et al. 2024, arXiv:2406.02507: away from a worse network `bad` of the same schedule. w = 1 is `role`
    alone."""
    return Autoguided(role, bad, w)


def drawn(w: float | tuple[float, float], step: Step) -> float | Tensor:
    """The scale of a moment in training: a fixed one, or uniform on a range for each sample, (B,)."""
    if isinstance(w, (int, float)):
        return float(w)
    low, high = w
    return low + (high - low) * step.uniform("guidance")
