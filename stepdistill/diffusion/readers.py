"""How stock schedulers are read: of each one's grid a row for every evaluation of the network, and the rule that takes
it on."""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Callable

import torch
from torch import Tensor

from .consistency import SIGMA_DATA, edm_scalings
from .flow_map import ddim_step
from .prediction import Prediction
from .schedule import RectifiedFlow, Schedule, TrigFlow, VariancePreserving, like
from .solvers import dpmpp_2m_step, trapezoid

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# (the last two predictions, the landing (B,), fresh noise or None) -> the next state
Rule = Callable[[list[Prediction], Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """One call of the network. time, level and landing are times in [0, 1]; `noisy`: the rule takes fresh noise.

    time: what the network reads; level: where the state is. They differ where a scheduler rounds its timesteps (Karras
    sigmas) or interpolates in its own way.
    """

    time: float
    level: float
    landing: float
    rule: Rule
    noisy: bool = False


# Rules ---------------------------------------------------------------------------------------------------------------
def _ddim(history: list[Prediction], r: Tensor, noise: Tensor | None) -> Tensor:
    return ddim_step(history[-1], r)


def _heun(history: list[Prediction], r: Tensor, noise: Tensor | None) -> Tensor:
    return trapezoid(history[-2], history[-1])


def _dpmpp_2m(history: list[Prediction], r: Tensor, noise: Tensor | None) -> Tensor:
    return dpmpp_2m_step(history[-2], history[-1], r)


def _consistency(history: list[Prediction], r: Tensor, noise: Tensor | None, c_skip: float, c_out: float) -> Tensor:
    """Luo et al. 2023, arXiv:2310.04378, eq. 9: the scaled x_0, re-noised to the landing unless it is the last."""
    p = history[-1]
    x0 = c_out * p.x0 + c_skip * p.x_t
    return x0 if noise is None else p.schedule.add_noise(x0, noise, r)


def _iterative(history: list[Prediction], r: Tensor, noise: Tensor | None, c_skip: float, c_out: float, spread: float,
               clip: float) -> Tensor:
    """Song et al. 2023, arXiv:2303.01469, algorithm 1: f, within +-clip, and noise of this deviation unless it is the
    last."""
    p = history[-1]
    x0 = (c_out * p.x0 + c_skip * p.x_t).clamp(-clip, clip)
    return x0 if noise is None else like(p.schedule.alpha(r), x0) * (x0 + spread * noise)


def _ancestral(history: list[Prediction], r: Tensor, noise: Tensor | None, spread: float, clip: float) -> Tensor:
    """Ho et al. 2020, arXiv:2006.11239, algorithm 2: the mean of what lies at r between x_t and x_0, which is kept
    within +-clip, and noise of this deviation."""
    p = history[-1]
    x0, (alpha, sigma), (alpha_r, sigma_r) = (p.x0.clamp(-clip, clip),
                                              *((p.schedule.alpha(t), p.schedule.sigma(t)) for t in (p.t, r)))
    # of x_t; sigma_r^2 is what x_0 and the noise leave of it
    kept = (sigma_r / sigma) ** 2 * (alpha / alpha_r)
    mean = like(kept, x0) * p.x_t + like(alpha_r - kept * alpha, x0) * x0
    return mean if noise is None else mean + spread * noise


def _strategic(history: list[Prediction], r: Tensor, noise: Tensor | None, through: float) -> Tensor:
    """Zheng et al. 2024, arXiv:2402.19159, algorithm 4: by DDIM past the landing, to `through`, and back by fresh
    noise."""
    p, s = history[-1], torch.full_like(r, through)
    x_s = ddim_step(p, s)
    return x_s if noise is None else p.schedule.renoise(x_s, noise, s, r)


MULTISTEP = (_heun, _dpmpp_2m)                      # rules that look back at the evaluation before


# Readers: (scheduler with its grid set, schedule) -> (start scale, evaluations) --------------------------------------
def _demand(scheduler: SchedulerMixin, **wanted: Any) -> None:
    for key, value in wanted.items():
        if scheduler.config[key] != value:
            raise ValueError(f"{type(scheduler).__name__} with {key}={scheduler.config[key]!r} is not "
                             f"reproduced by the sampler: use a scheduler config with {key}={value!r}")


def _vp_times(scheduler: SchedulerMixin, schedule: Schedule) -> list[float]:
    """The times that the network reads on a schedule of N nodes: t = (timestep + 1) / N."""
    if not isinstance(schedule, VariancePreserving):
        raise ValueError(f"{type(scheduler).__name__} serves variance-preserving networks, found "
                         f"{type(schedule).__name__}: use a FlowMatchEulerDiscreteScheduler, or present the network "
                         "by viewed(role, schedule)")
    timesteps = scheduler.timesteps.double()
    last = scheduler.config["num_train_timesteps"] - 1
    # leading grids overrun by steps_offset, trailing ones by rounding
    if timesteps.max() > last or timesteps.min() < 0:
        raise ValueError(f"{type(scheduler).__name__} would give the network timesteps from {timesteps.min():g} to "
                         f"{timesteps.max():g}, where "
                         f"0 to {last} exist: take another number of steps, or another steps_offset")
    return ((timesteps + 1) / schedule.nodes).tolist()


def _level(alphas_cumprod: Tensor, schedule: Schedule) -> list[float]:
    squares = alphas_cumprod.double()
    return schedule.time_at(torch.atan2((1 - squares).sqrt(), squares.sqrt())).tolist()


def _lcm(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    _demand(scheduler, clip_sample=False, thresholding=False)
    times = _vp_times(scheduler, schedule)
    levels = _level(scheduler.alphas_cumprod[scheduler.timesteps], schedule)
    scalings = (scheduler.get_scalings_for_boundary_condition_discrete(t) for t in scheduler.timesteps.tolist())
    rules = [partial(_consistency, c_skip=c_skip, c_out=c_out) for c_skip, c_out in scalings]
    noisy = [True] * (len(times) - 1) + [False]
    return 1.0, [Evaluation(*row) for row in zip(times, levels, levels[1:] + [0.0], rules, noisy)]


def _tcd(scheduler: SchedulerMixin, schedule: Schedule, eta: float = 0.0) -> tuple[float, list[Evaluation]]:
    """Its clean data is timestep 0, which still holds a little noise."""
    times, timesteps = _vp_times(scheduler, schedule), scheduler.timesteps
    after = torch.cat([timesteps[1:], timesteps.new_zeros(1)])
    through = torch.floor((1 - eta) * after).long()                      # in float32, as the scheduler rounds
    levels, landings, middles = (_level(scheduler.alphas_cumprod[i], schedule) for i in (timesteps, after, through))
    rules = [partial(_strategic, through=middle) for middle in middles]
    noisy = [eta > 0] * (len(times) - 1) + [False]
    return 1.0, [Evaluation(*row) for row in zip(times, levels, landings, rules, noisy)]


def _ddim_reader(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    _demand(scheduler, clip_sample=False, thresholding=False)
    times = _vp_times(scheduler, schedule)
    # The stock landing is a fixed stride below, which is the next timestep only where the steps divide the nodes.
    after = scheduler.timesteps - scheduler.config["num_train_timesteps"] // len(times)
    landings = torch.where(after >= 0, scheduler.alphas_cumprod[after.clamp(min=0)], scheduler.final_alpha_cumprod)
    levels = _level(scheduler.alphas_cumprod[scheduler.timesteps], schedule)
    return 1.0, [Evaluation(*row, _ddim) for row in zip(times, levels, _level(landings, schedule))]


def _ddpm(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    """It lands on the next timestep that it asks for, and adds noise at every one above 0."""
    _demand(scheduler, thresholding=False)
    if not (large := scheduler.config["variance_type"] == "fixed_large"):
        _demand(scheduler, variance_type="fixed_small")
    times, timesteps = _vp_times(scheduler, schedule), scheduler.timesteps
    kept = torch.cat([scheduler.alphas_cumprod[timesteps].double(), torch.ones(1, dtype=torch.float64)])
    variances = 1 - kept[:-1] / kept[1:]
    if not large:
        variances = variances * (1 - kept[1:]) / (1 - kept[:-1])
    levels, clip = (_level(kept, schedule), scheduler.config["clip_sample_range"] if scheduler.config["clip_sample"]
                    else inf)
    rules = [partial(_ancestral, spread=spread, clip=clip) for spread in variances.sqrt().tolist()]
    return 1.0, [Evaluation(*row) for row in zip(times, levels, levels[1:], rules, (timesteps > 0).tolist())]


def _sigma_levels(scheduler: SchedulerMixin, schedule: Schedule) -> list[float]:
    """Levels of a scheduler that keeps sigma / alpha: one more than it has evaluations."""
    return schedule.time_at(torch.atan(scheduler.sigmas.double())).tolist()


def _euler(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    _demand(scheduler, timestep_type="discrete")
    times, levels = _vp_times(scheduler, schedule), _sigma_levels(scheduler, schedule)
    return _start(scheduler), [Evaluation(*row, _ddim) for row in zip(times, levels, levels[1:])]


def _start(scheduler: SchedulerMixin) -> float:
    """Of a scheduler whose state is x / alpha: its first state, brought back to alpha x_0 + sigma eps."""
    return float(scheduler.init_noise_sigma / (scheduler.sigmas[0].double() ** 2 + 1).sqrt())


def _heun_reader(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    _demand(scheduler, clip_sample=False)
    times, levels = _vp_times(scheduler, schedule), _sigma_levels(scheduler, schedule)
    rules = [_heun if i % 2 else _ddim for i in range(len(times))]        # the stock grid holds every inner node twice
    return _start(scheduler), [Evaluation(*row) for row in zip(times, levels, levels[1:], rules)]


def _dpmpp_2m_reader(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    flow = isinstance(schedule, RectifiedFlow)
    _demand(scheduler, algorithm_type="dpmsolver++", solver_type="midpoint", solver_order=2, thresholding=False,
            use_flow_sigmas=flow, final_sigmas_type="zero", variance_type=None)
    times, levels = (_flow_times(scheduler, schedule) if flow else
                     (_vp_times(scheduler, schedule), _sigma_levels(scheduler, schedule)))
    rules = [_ddim, *[_dpmpp_2m] * (len(times) - 2), _ddim][-len(times):]
    return 1.0, [Evaluation(*row) for row in zip(times, levels, levels[1:], rules)]


def _edm_levels(scheduler: SchedulerMixin, schedule: Schedule) -> list[float]:
    if not isinstance(schedule, TrigFlow):
        raise ValueError(f"{type(scheduler).__name__} serves networks by EDM's clock, found {type(schedule).__name__}")
    _demand(scheduler, sigma_data=SIGMA_DATA)
    return _sigma_levels(scheduler, schedule)


def _iterative_reader(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    """Of several steps the last, too, draws noise, and multiplies it by zero."""
    levels, config = _edm_levels(scheduler, schedule)[:-1], scheduler.config
    _demand(scheduler, s_noise=1.0)
    spreads = (scheduler.sigmas[1:].double().clamp(config["sigma_min"], config["sigma_max"]) ** 2
               - config["sigma_min"] ** 2).sqrt().tolist()
    scalings = zip(*(c.tolist() for c in edm_scalings(schedule, torch.tensor(levels, dtype=torch.float64),
                                                      config["sigma_min"])))
    rules = [partial(_iterative, c_skip=c_skip, c_out=c_out, spread=spread, clip=1.0 if config["clip_denoised"]
                     else inf)
             for (c_skip, c_out), spread in zip(scalings, spreads)]
    noisy = [True] * (len(levels) - 1) + [False]
    return _start(scheduler), [Evaluation(*row) for row in zip(levels, levels, levels[1:] + [0.0], rules, noisy)]


def _edm_euler(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    _demand(scheduler, prediction_type="epsilon", final_sigmas_type="zero")
    levels = _edm_levels(scheduler, schedule)
    return _start(scheduler), [Evaluation(*row, _ddim) for row in zip(levels, levels, levels[1:])]


def _edm_dpmpp_2m(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    _demand(scheduler, algorithm_type="dpmsolver++", solver_type="midpoint", solver_order=2, thresholding=False,
            euler_at_final=False)
    start, evaluations = _edm_euler(scheduler, schedule)
    return start, [replace(e, rule=_dpmpp_2m) if 0 < i < len(evaluations) - 1 else e for i, e in enumerate(evaluations)]


def _flow_times(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[list[float], list[float]]:
    """The times that the network reads, and the levels: one more."""
    if not isinstance(schedule, RectifiedFlow):
        raise ValueError(f"{type(scheduler).__name__} serves rectified flows, found {type(schedule).__name__}")
    sigmas, times = scheduler.sigmas.double(), scheduler.timesteps.double() / scheduler.config["num_train_timesteps"]
    times, levels = (schedule.time_at(torch.atan2(s, 1 - s)).tolist() for s in (times, sigmas))
    return times, levels


def _flow_euler(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    _demand(scheduler, invert_sigmas=False)
    times, levels = _flow_times(scheduler, schedule)
    if not scheduler.config["stochastic_sampling"]:
        return 1.0, [Evaluation(*row, _ddim) for row in zip(times, levels, levels[1:])]
    rule = partial(_consistency, c_skip=0.0, c_out=1.0)
    return 1.0, [Evaluation(*row, rule, noisy=True) for row in zip(times, levels, levels[1:])]


def _flow_lcm(scheduler: SchedulerMixin, schedule: Schedule) -> tuple[float, list[Evaluation]]:
    """The stock scheduler also draws noise after its last step, and multiplies it by zero."""
    _demand(scheduler, invert_sigmas=False, scale_factors=None)
    times, levels = _flow_times(scheduler, schedule)
    rule = partial(_consistency, c_skip=0.0, c_out=1.0)
    noisy = [True] * (len(times) - 1) + [False]
    return 1.0, [Evaluation(*row[:3], rule, row[3]) for row in zip(times, levels, levels[1:], noisy)]


READERS: dict[str, Callable[..., tuple[float, list[Evaluation]]]] = {
    "DDPMScheduler": _ddpm,
    "CMStochasticIterativeScheduler": _iterative_reader,
    "EDMEulerScheduler": _edm_euler,
    "EDMDPMSolverMultistepScheduler": _edm_dpmpp_2m,
    "LCMScheduler": _lcm,
    "TCDScheduler": _tcd,
    "DDIMScheduler": _ddim_reader,
    "EulerDiscreteScheduler": _euler,
    "HeunDiscreteScheduler": _heun_reader,
    "DPMSolverMultistepScheduler": _dpmpp_2m_reader,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "FlowMatchLCMScheduler": _flow_lcm,
}
