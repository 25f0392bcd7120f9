"""The consistency function f(x_t, t) = c_skip x_t + c_out x_0, as the stock schedulers of consistency models have
it."""
from __future__ import annotations

from torch import Tensor

from .prediction import Prediction
from .schedule import RectifiedFlow, Schedule, like
from .times import LEVELS

SIGMA_DATA = 0.5                  # fixed in LCMScheduler
TIMESTEP_SCALING = 10.0           # LCMScheduler's default


def consistency(p: Prediction) -> Tensor:
    """f(p.x_t, p.t): Luo et al. 2023, arXiv:2310.04378, eq. 9. It is p.x_t at `origin`, whatever was predicted
    there."""
    c_skip, c_out = scalings(p.schedule, p.t)
    return like(c_skip, p.x_t) * p.x_t + like(c_out, p.x_t) * p.x0


def scalings(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of the scheduler that samples: LCMScheduler's at the timestep that the network reads;
    FlowMatchLCMScheduler has none, since the x_0 of a velocity is x where t = 0."""
    if isinstance(schedule, RectifiedFlow):
        return 0 * t, 1 + 0 * t
    scaled = TIMESTEP_SCALING * (LEVELS * t - 1)
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


def origin(schedule: Schedule) -> float:
    """The time that is the data's, at which f is the identity: on a flow 0; LCMScheduler and TCDScheduler take timestep
    0 for it, which still holds a little noise."""
    return 0.0 if isinstance(schedule, RectifiedFlow) else 1 / LEVELS
