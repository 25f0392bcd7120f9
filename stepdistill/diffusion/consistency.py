"""The consistency function f(x_t, t) = c_skip x_t + c_out x_0, as the stock schedulers of consistency models have
it."""
from __future__ import annotations

import torch
from torch import Tensor

from .prediction import Prediction
from .schedule import RectifiedFlow, Schedule, TrigFlow, like
from .times import LEVELS

SIGMA_DATA = 0.5                  # fixed in LCMScheduler; of EDM's networks
SIGMA_MIN = 0.002                 # of EDM's networks the noise level that counts as the data
TIMESTEP_SCALING = 10.0           # LCMScheduler's default


def consistency(p: Prediction) -> Tensor:
    """f(p.x_t, p.t): Luo et al. 2023, arXiv:2310.04378, eq. 9. It is p.x_t at `origin`, whatever was predicted
    there."""
    c_skip, c_out = scalings(p.schedule, p.t)
    return like(c_skip, p.x_t) * p.x_t + like(c_out, p.x_t) * p.x0


def scalings(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of the scheduler that samples: LCMScheduler's at the timestep that the network reads;
    FlowMatchLCMScheduler has none, since the x_0 of a velocity is x where t = 0; of EDM's networks
    CMStochasticIterativeScheduler's."""
    if isinstance(schedule, RectifiedFlow):
        return 0 * t, 1 + 0 * t
    if isinstance(schedule, TrigFlow):
        return edm_scalings(schedule, t, SIGMA_MIN)
    scaled = TIMESTEP_SCALING * (LEVELS * t - 1)
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


def edm_scalings(schedule: Schedule, t: Tensor, sigma_min: float) -> tuple[Tensor, Tensor]:
    """Song et al. 2023, arXiv:2303.01469, appendix C: c_skip x + c_out F of EDM's x = x_t / alpha and output F, here of
    x_t and of the x_0 that F predicts. It is x at sigma_min and below, where sigma is of x."""
    sigma = schedule.angle(t).tan().clamp(min=sigma_min)
    skip, kept = (SIGMA_DATA**2 / (level**2 + SIGMA_DATA**2) for level in (sigma - sigma_min, sigma))
    c_out = 1 - sigma_min / sigma
    return (skip - c_out * kept) / schedule.alpha(t), c_out


def origin(schedule: Schedule) -> float:
    """The time that is the data's, at which f is the identity: on a flow 0; LCMScheduler and TCDScheduler take timestep
    0 for it, which still holds a little noise, as EDM's sigma_min does."""
    if isinstance(schedule, TrigFlow):
        return schedule.time_at(torch.tensor([SIGMA_MIN], dtype=torch.float64).atan()).item()
    return 0.0 if isinstance(schedule, RectifiedFlow) else 1 / LEVELS
