"""A network presented under another schedule than the one it was trained on."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contracts import Condition, Role
from .prediction import Prediction
from .schedule import Schedule, like
from .wrapper import Wrapper


@dataclass(frozen=True)
class Viewed(Wrapper):
    """See `viewed`. shown: the schedule that it is presented under."""

    shown: Schedule

    @property
    def schedule(self) -> Schedule:
        return self.shown

    def inner_time(self, t: Tensor) -> Tensor:
        return self.role.schedule.time_at(self.shown.angle(t))

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        own, angle = self.role.schedule, self.schedule.angle(t)
        own_t = self.inner_time(t)
        norm, own_norm = (torch.hypot(s.alpha(u), s.sigma(u)) for s, u in ((self.schedule, t), (own, own_t)))
        p = self.role(like(own_norm / norm, x_t) * x_t, own_t, cond)
        # On the unit circle x = cos x_0 + sin eps and v = cos eps - sin x_0, and v is the view that is regular at both
        # ends. Where the network's own schedule stops short of pure noise the angles differ, and it is x_0 that is
        # kept.
        own_angle = own.angle(own_t)
        keep = torch.where(angle > 0, own_angle.sin() / angle.sin(), 1.0)
        shift = torch.where(angle > 0, (angle.cos() - own_angle.cos()) / angle.sin(), 0.0)
        return Prediction(like(keep * norm / own_norm, x_t) * p.v + like(shift, x_t) * x_t, x_t, t, self.schedule, "v")


def viewed(role: Role, schedule: Schedule) -> Role:
    """The same network under `schedule`: matched by signal-to-noise ratio, x_t rescaled, and given its own time."""
    return role if role.schedule == schedule else Viewed(role, schedule)
