"""EDM's clock (Karras et al. 2022, arXiv:2206.00364), whose schedulers scale what a network reads and gives, beside
that of discrete times."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from math import atan
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, SchedulerMixin
from torch import Tensor

from ..diffusion.consistency import SIGMA_DATA
from ..diffusion.schedule import TrigFlow
from .families.shared import DISCRETE, discrete_refusals

_SCHEDULERS = ("EDM", "CMStochastic")


def by_edm(scheduler_class: str) -> bool:
    """Whether a scheduler of this class goes by EDM's clock."""
    return scheduler_class.startswith(_SCHEDULERS)


def schedule(scheduler: SchedulerMixin) -> TrigFlow:
    """EDM's noise by its angle: x_t is its x_0 + sigma eps, brought to a norm of 1."""
    return TrigFlow(atan(scheduler.config.sigma_max))


def timestep(t: Tensor, scheduler: SchedulerMixin) -> Tensor:
    """ln(sigma) / 4, of consistency models 1000 of it; no less than at the least noise that they are taught."""
    sigma = schedule(scheduler).angle(t).tan().clamp(min=scheduler.config.sigma_min)
    return sigma.log() * (250 if isinstance(scheduler, CMStochasticIterativeScheduler) else 0.25)


def scaling(t: Tensor, scheduler: SchedulerMixin) -> Tensor:
    """Table 1: c_in of the x that is x_t / alpha."""
    alpha, sigma = schedule(scheduler).alpha(t), schedule(scheduler).sigma(t)
    return torch.hypot(sigma, alpha * scheduler.config.sigma_data) ** -1


def refusals(scheduler: SchedulerMixin) -> dict[str, bool]:
    """Reason -> whether it holds, for schedulers of either clock that are not translated."""
    if not by_edm(type(scheduler).__name__):
        return discrete_refusals(scheduler)
    config = scheduler.config
    return {
        f"its scheduler has sigma_data: {config.sigma_data}, and networks of {SIGMA_DATA} are served":
            config.sigma_data != SIGMA_DATA,
        f"its scheduler has prediction_type: {config.get('prediction_type')}":
            config.get("prediction_type", "epsilon") != "epsilon",
    }


_EDM: Mapping[str, Any] = {"schedule": schedule, "kind": lambda scheduler: "edm", "timestep": timestep,
                           "scaling": scaling}
_PLAIN: Mapping[str, Any] = {**DISCRETE, "scaling": lambda t, scheduler: torch.ones_like(t)}


def _either(field: str) -> Callable[..., Any]:
    return lambda *given: (_EDM if by_edm(type(given[-1]).__name__) else _PLAIN)[field](*given)


EITHER: Mapping[str, Any] = {field: _either(field) for field in _EDM}
"""The fields of a Family whose scheduler, the last of what each is given, goes by one clock or the other."""
