"""Roles made of roles: what holds for all of them."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import Tensor

from .contracts import Condition, Role
from .prediction import Prediction
from .schedule import Schedule


@dataclass(frozen=True)
class Wrapper(ABC):
    """A role that asks another one. Whatever looks for a property of the network behind it goes through `over`.

    Every role that holds a role is one of these, with `role: Role` and, where there are more, further fields annotated
    `Role`: all of them are found by their annotation, so that a new wrapper has nothing to remember.
    """

    role: Role

    @property
    def schedule(self) -> Schedule:
        return self.role.schedule

    @abstractmethod
    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction: ...

    def inner_time(self, t: Tensor) -> Tensor:
        """The time (B,) at which the wrapped role is asked for t (B,)."""
        return t

    def over(self, change: Callable[[Role], Role]) -> Role:
        """The same wrapper over changed roles."""
        return replace(self, **{f.name: change(vars(self)[f.name]) for f in fields(self) if f.type in ("Role", Role)})
