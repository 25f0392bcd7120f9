"""When a consistency model of continuous time is trained and sampled: noise levels as times of TrigFlow, whatever
schedule its networks have."""
from __future__ import annotations

import torch
from torch import Tensor

from .schedule import RectifiedFlow, Schedule, TrigFlow, VariancePreserving
from .times import LEVELS, Law, log_normal, shifted, uniform

TRIG = TrigFlow()
NOISIEST = 80.0                   # sigma / alpha where sampling starts, or the schedule's end: the tangent is 0 at pure
                                  # noise, and teaches nothing
NOISIEST_FLOW = 999.0             # of a flow: at sigma = 0.999 unit noise, which samplers begin with, is 0.1 % too
                                  # loud; at 80 1.2 %
FIRST = 1 / LEVELS                # of a network's own times, those that it was taught
INSIDE = 0.1 / LEVELS             # how far from the ends they are drawn: a timestep that is all but whole is rounded,
                                  # and has no derivative
SHIFT = 2.0                       # of a flow's sampling times towards noise: two steps meet at theta = 1.1, as in sCM's
                                  # paper


def start(schedule: Schedule) -> float:
    """The networks' own time at which training is cut and sampling begins, one place for both: that of NOISIEST, on
    discrete nodes the last one below it, or 1 where the schedule ends before."""
    noisiest = NOISIEST_FLOW if isinstance(schedule, RectifiedFlow) else NOISIEST
    t = schedule.time_at(torch.tensor([noisiest], dtype=torch.float64).atan()).item()
    return int(t * schedule.nodes + 1e-6) / schedule.nodes if isinstance(schedule, VariancePreserving) else t


def sampled_at(steps: int, schedule: Schedule) -> tuple[float, ...] | None:
    """The networks' own times of a sampler of so many steps; None: even ones, which begin at pure noise."""
    first, discrete = start(schedule), isinstance(schedule, VariancePreserving)
    if discrete and first == 1:
        return None
    time = uniform() if discrete else shifted(uniform(), SHIFT)
    return tuple(min(time(1 - i / steps), first) for i in range(steps))


def trig_time(own: Schedule, t: Tensor) -> Tensor:
    """The times of TRIG at the noise levels of times t of a schedule."""
    return TRIG.time_at(own.angle(t))


def latest(own: Schedule) -> float:
    """The last of the networks' own times at which they are trained."""
    return start(own) - INSIDE if isinstance(own, VariancePreserving) else min(start(own), 1 - INSIDE)


def trained_at(own: Schedule, mean: float, std: float) -> Law:
    """Times of TRIG with ln(tan theta) ~ N(mean, std^2), float64. What the law puts beyond the noise that sampling
    starts in counts as that. own: the networks' schedule."""
    level, last = log_normal(own, mean, std), latest(own)
    return lambda u: trig_time(own, level(u).clamp(FIRST + INSIDE, last))
