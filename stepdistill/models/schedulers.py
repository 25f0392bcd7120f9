"""Stock schedulers under a teacher's noise: how a student's inference is said to diffusers, and by what teachers are
measured."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import diffusers
import torch
from diffusers import CMStochasticIterativeScheduler, SchedulerMixin

from ..diffusion.consistency import SIGMA_MIN, TIMESTEP_SCALING
from ..diffusion.prediction import PARAMETERISATIONS
from ..diffusion.sampler import Sampler
from ..diffusion.schedule import RectifiedFlow, Schedule, TrigFlow, VariancePreserving
from ..diffusion.times import LEVELS
from ..methods.base import Inference
from .stock import USUAL, Guidance

NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
         "prediction_type", "shift", "use_dynamic_shifting")
# which a student may choose anew
LAW = tuple(name for name in NOISE if name not in ("shift", "use_dynamic_shifting"))
# Of a flow's scheduler that takes a call's sigmas as they are, whatever the teacher's own grid.
AS_GIVEN = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False,
            "use_exponential_sigmas": False, "use_beta_sigmas": False}
UNCLIPPED = {"clip_sample": False, "thresholding": False}
# Karras et al. 2022, arXiv:2206.00364, eq. 5; nodes that hold any level to 1e-4 of it
RHO, FINE = 7.0, 100_001
# by how much a scheduler's own grid may miss the sigmas that are wanted
EVEN = 1e-6
# |alpha b - sigma a| below which x_0 is no more than the network's error
LEAST = 1e-3
DIVISORS = tuple(d for d in range(1, LEVELS + 1) if LEVELS % d == 0)


@dataclass(frozen=True)
class StockCall:
    """How a stock pipeline samples a student.

    `scheduler` names a class of diffusers; `config` is changed on top of the teacher's own scheduler config. call: the
    literal keyword arguments of the pipeline call. components: parts of the pipeline to replace.
    """

    scheduler: str
    config: Mapping[str, Any]
    call: Mapping[str, Any]
    components: Mapping[str, Any] = field(default_factory=dict)


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a stock scheduler is one of flow matching."""
    return type(scheduler).__name__.startswith("FlowM") or bool(scheduler.config.get("use_flow_sigmas"))


def stock_call(inference: Inference, schedule: Schedule, guidance: Guidance = USUAL, own: SchedulerMixin | None = None,
               sigmas: bool = True) -> StockCall:
    """An inference as a scheduler and a call of diffusers. schedule: the teacher's; own: its scheduler, by whose clock
    a network of EDM's goes; sigmas: whether a call of the pipeline takes a flow's. ValueError where no stock scheduler
    does it."""
    if inference.steps < 1:
        raise ValueError(f"a sampler takes at least 1 step; found {inference.steps}")
    if inference.cfg > 1 and (guidance.keyword is None or guidance.within):
        raise ValueError("its student is guided by its pipeline, against what it says of no prompt, and no call of "
                         "this teacher's pipeline guides so")
    spoken = guidance.none if inference.cfg == 1 else guidance.call(inference.cfg)
    call = {"num_inference_steps": inference.steps, **spoken}
    if inference.guidance is not None and guidance.embedded is not None:
        call[guidance.embedded] = inference.guidance
    if isinstance(schedule, RectifiedFlow):
        return _flow(inference, call, sigmas)
    if isinstance(schedule, VariancePreserving):
        return _variance_preserving(inference, call)
    if isinstance(schedule, TrigFlow) and own is not None:
        return (_iterative if isinstance(own, CMStochasticIterativeScheduler) else _edm)(inference, call, schedule)
    raise ValueError(f"no stock scheduler samples on a {type(schedule).__name__}")


def _flow(inference: Inference, call: dict[str, Any], sigmas: bool) -> StockCall:
    """A flow's sigmas are its times; the stock scheduler shifts those that it is given. Where a call takes none, the
    scheduler makes them of their count."""
    if inference.end:
        raise ValueError(f"the stock schedulers of flows end on the data, at t = 0; found {inference.end:g}")
    if inference.noise not in (0, 1):
        raise ValueError("no stock scheduler of a flow adds a share of fresh noise: FlowMatchEulerDiscreteScheduler "
                         f"adds none, FlowMatchLCMScheduler all of it; found {inference.noise:g}")
    grid = _times(inference)
    if sigmas:
        call["sigmas"], config = grid, AS_GIVEN | {"shift": inference.shift}
    else:
        config = AS_GIVEN | own_grid([inference.shift * t / (1 + (inference.shift - 1) * t) for t in grid])
    if inference.noise:
        return StockCall("FlowMatchLCMScheduler", config, call)
    return StockCall("FlowMatchEulerDiscreteScheduler", config | {"stochastic_sampling": False}, call)


def _times(inference: Inference) -> list[float]:
    """When the network is asked, where nothing but their number says how times are spaced."""
    steps, nodes = inference.steps, inference.nodes
    if inference.times is not None:
        return list(inference.times)
    return [1 - i / steps for i in range(steps)] if nodes is None else [(nodes - nodes * i // steps) / nodes
                                                                        for i in range(steps)]


def _sigmas(inference: Inference, schedule: Schedule) -> list[float]:
    """Of a network of EDM's, when it is asked."""
    if inference.end or inference.shift != 1:
        raise ValueError("the stock schedulers by EDM's clock end on the data and shift nothing; found end = "
                         f"{inference.end:g}, shift = {inference.shift:g}")
    return schedule.angle(torch.tensor(_times(inference), dtype=torch.float64)).tan().tolist()


def _iterative(inference: Inference, call: dict[str, Any], schedule: Schedule) -> StockCall:
    """A call's timesteps count the scheduler's own nodes, from the data to noise: as many as it takes to come near any
    time."""
    if inference.steps > 1 and inference.noise != 1:
        raise ValueError("CMStochasticIterativeScheduler adds fresh noise in each step, and no other stock scheduler "
                         f"goes by the clock of consistency models; found {inference.steps} steps with noise = "
                         f"{inference.noise:g}, and 1 step would be served")
    first, *_ = sigmas = _sigmas(inference, schedule)
    high, low = first ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    call["timesteps"] = [round((high - sigma ** (1 / RHO)) / (high - low) * (FINE - 1)) for sigma in sigmas][::-1]
    config = {"num_train_timesteps": FINE, "sigma_min": SIGMA_MIN, "sigma_max": first, "rho": RHO, "s_noise": 1.0,
              "clip_denoised": False}
    return StockCall("CMStochasticIterativeScheduler", config, call)


def _edm(inference: Inference, call: dict[str, Any], schedule: Schedule) -> StockCall:
    """EDMEulerScheduler spaces its levels from sigma_max to sigma_min by Karras' rule alone, and steps to the data from
    there."""
    sigmas = _sigmas(inference, schedule)
    if len(sigmas) > 1 and inference.noise or len(sigmas) > 2:
        raise ValueError("of the stock schedulers by EDM's clock none adds fresh noise, and EDMEulerScheduler takes "
                         f"even steps where they are 1 or 2; found {inference.steps} steps with noise = "
                         f"{inference.noise:g}, and 1 step would be served")
    config = {"sigma_max": sigmas[0], "sigma_min": SIGMA_MIN if len(sigmas) == 1 else sigmas[-1],
              "sigma_schedule": "karras",
              "rho": RHO, "final_sigmas_type": "zero"}
    return StockCall("EDMEulerScheduler", config, call)


def own_grid(sigmas: Sequence[float]) -> dict[str, float | None]:
    """The shift and the end with which a stock scheduler of a flow makes these sigmas of their number alone, to 1e-6.

    With the shift s its own grid of k steps goes evenly from 1 to the shifted 1 / N, N its training times, is shifted
    by s once more, and is then stretched so that it ends at `shift_terminal`:

        1 - sigma_i = c i / (1 - b i),   b = (N - 1) (s - 1) / ((N + s - 1) (k - 1) s),   i = 0 ... k - 1.

    An even grid 1 ... 1 / k is that of b = 0, one that is shifted another b. ValueError for any other.
    """
    last, away = len(sigmas) - 1, [1 - sigma for sigma in sigmas]
    if not last and not away[0]:
        return {"shift": 1.0, "shift_terminal": None}
    bend = 0.0 if last < 2 else round((away[-1] / away[1] - last) / (away[-1] / away[1] - 1), 12)      # b (k - 1)
    span = (LEVELS - 1) * (1 - bend)
    root = span**2 - 4 * bend * (LEVELS - 1)
    made = [away[-1] * i * (1 - bend) / (last - bend * i) for i in range(last + 1)] if last and root >= 0 else []
    if not made or max(abs(a - b) for a, b in zip(made, away, strict=True)) > EVEN:
        asked = ", ".join(f"{t:.4g}" for t in sigmas)
        raise ValueError("a call of its pipeline takes no times, and of a number of steps a scheduler makes even "
                         f"ones from t = 1, also shifted ones; the method asks for {asked}. Choose steps that divide "
                         "its nodes, or another method")
    return {"shift": 2 * (LEVELS - 1) / (span + sqrt(root)), "shift_terminal": sigmas[-1]}


def _variance_preserving(inference: Inference, call: dict[str, Any]) -> StockCall:
    """TCDScheduler is the one that lands on node 0 rather than on the data, and the one for a share of fresh noise.

    Yin et al. 2024, arXiv:2405.14867, section 4.4, note x_0 again at equally spaced times: LCMScheduler's boundary
    scalings differ from that by less than 1e-6 there. Where `steps` do not divide 1000 its times are floor(1000 /
    steps) apart.
    """
    if inference.shift != 1:
        raise ValueError(f"the nodes of a discrete schedule are not shifted; found shift = {inference.shift:g}")
    nodes = {"original_inference_steps": inference.nodes or inference.steps}
    if inference.times is not None:
        if inference.noise != 1 or inference.end:
            raise ValueError("of the stock schedulers LCMScheduler alone takes a call's own times; they want fresh "
                             f"noise in each step, and the data as their end; found noise = {inference.noise:g}, "
                             f"end = {inference.end:g}")
        call["timesteps"] = [round(LEVELS * t) - 1 for t in inference.times]
    if inference.end:
        if round(inference.end * LEVELS, 9) != 1:
            raise ValueError(f"TCDScheduler ends at the data or at its first node, t = {1 / LEVELS}; found "
                             f"{inference.end:g}")
        return StockCall("TCDScheduler", nodes, call | {"eta": inference.noise})
    if inference.noise == 1:
        return StockCall("LCMScheduler", {**nodes, "timestep_scaling": TIMESTEP_SCALING, **UNCLIPPED}, call)
    if inference.noise or inference.nodes is not None:
        raise ValueError("no stock scheduler ends on the data after steps with a share of fresh noise, or takes "
                         f"even steps of a finer grid; found noise = {inference.noise:g}, nodes = {inference.nodes}")
    return _even_steps(inference, call)


def _even_steps(inference: Inference, call: dict[str, Any]) -> StockCall:
    """DDIM from t = 1 over equal steps, each of which lands where the next begins.

    DDIMScheduler, asked at time 1000 - 1000 i / steps - 1, rounded, lands floor(1000 / steps) below: where steps do not
    divide 1000 the state is at another noise level than the network is told (3 steps: at 333, told 332).
    EulerDiscreteScheduler's trailing steps land where the next begin, whatever their number, but it starts from noise
    that is alpha^2 / 2 too small, 0.2 % for Stable Diffusion; so DDIMScheduler is taken where it serves.
    """
    steps = inference.steps
    if not inference.exact_grid and steps <= LEVELS and LEVELS % steps:
        config = {"timestep_spacing": "trailing", "timestep_type": "discrete", "interpolation_type": "linear",
                  "final_sigmas_type": "zero",
                  "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
        return StockCall("EulerDiscreteScheduler", config, call)
    if LEVELS % steps:
        near = [max(d for d in DIVISORS if d < steps), *(d for d in DIVISORS if d > steps)][:2]
        raise ValueError(f"DDIMScheduler takes equal steps only where their number divides its {LEVELS} times; "
                         f"found {steps}, and {' or '.join(map(str, near))} would be right")
    return StockCall("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True, **UNCLIPPED}, call)


def noise_refusals(schedule: Schedule, kind: str, scheduler: SchedulerMixin) -> list[str]:
    """Whatever is predicted, x_0 must follow from it at t = 1, where samplers begin; and stock times must be nodes."""
    config = {key: scheduler.config[key] for key in ("prediction_type", "rescale_betas_zero_snr", "beta_schedule",
                                                     "trained_betas")
            if scheduler.config.get(key) not in (None, False)}
    if isinstance(schedule, VariancePreserving) and schedule.nodes != LEVELS:
        return [f"its scheduler has num_train_timesteps: {schedule.nodes}, and the stock schedulers of few-step "
                f"students are read at {LEVELS} times only: a teacher of {LEVELS} is served"]
    end = torch.ones(1, dtype=torch.float64)
    a, b = PARAMETERISATIONS[kind](schedule, end)
    apart = abs((schedule.alpha(end) * b - schedule.sigma(end) * a).item())
    if apart >= LEAST:
        return []
    named = ", ".join(f"{key}: {value}" for key, value in config.items())
    return [f"its scheduler ends in pure noise (alpha is {schedule.alpha(end).item():.1e} at t = 1), of which a "
            f"network that predicts noise says nothing about the picture; its scheduler_config.json says {named}. "
            "A zero terminal signal-to-noise ratio (rescale_betas_zero_snr) goes with prediction_type: v_prediction"]


def sampler_of(stock: StockCall, schedule: Schedule, teacher: SchedulerMixin) -> Sampler:
    """The sampler that training and sampling share, read off the stock scheduler. ValueError for what it does not
    serve."""
    scheduler = stock_scheduler(stock.scheduler, stock.config, teacher)
    return Sampler.of_call(scheduler, stock.call["num_inference_steps"], schedule, stock.call)


def stock_scheduler(name: str, config: Mapping[str, Any], teacher: SchedulerMixin) -> SchedulerMixin:
    """A diffusers scheduler of class `name` on the teacher's config, changed by `config`. ValueError for unknown keys.

    `from_config` replaces values that were defaults of the teacher's class by those of the new class, and classes
    differ in their default betas: what defines the noise is therefore handed over explicitly.
    """
    cls = getattr(diffusers, name)
    accepted = cls._get_init_keys(cls)
    unknown = sorted(set(config) - accepted)
    if unknown:
        raise ValueError(f"{name} of diffusers {diffusers.__version__} has no setting {', '.join(unknown)}; "
                         f"it has {', '.join(sorted(accepted - {'self'}))}")
    noise = {key: teacher.config[key] for key in NOISE if key in teacher.config and key in accepted}
    return cls.from_config(teacher.config, **{**noise, **config})
