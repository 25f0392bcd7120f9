"""Stock schedulers under a teacher's noise: how a student's inference is said to diffusers, and by what teachers are measured."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from ..diffusion.consistency import TIMESTEP_SCALING
from ..diffusion.sampler import Sampler
from ..diffusion.schedule import RectifiedFlow, Schedule, VariancePreserving
from ..diffusion.times import LEVELS
from ..methods.base import Inference
from .stock import USUAL, Guidance

NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
         "prediction_type", "shift", "use_dynamic_shifting")
LAW = tuple(name for name in NOISE if name not in ("shift", "use_dynamic_shifting"))      # which a student may choose anew
# Of a flow's scheduler that takes a call's sigmas as they are, whatever the teacher's own grid.
AS_GIVEN = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False,
            "use_exponential_sigmas": False, "use_beta_sigmas": False}
UNCLIPPED = {"clip_sample": False, "thresholding": False}
DIVISORS = tuple(d for d in range(1, LEVELS + 1) if LEVELS % d == 0)


@dataclass(frozen=True)
class StockCall:
    """How a stock pipeline samples a student.

    `scheduler` names a class of diffusers; `config` is changed on top of the teacher's own scheduler config. call: the literal
    keyword arguments of the pipeline call. components: parts of the pipeline to replace.
    """

    scheduler: str
    config: Mapping[str, Any]
    call: Mapping[str, Any]
    components: Mapping[str, Any] = field(default_factory=dict)


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a stock scheduler is one of flow matching."""
    return type(scheduler).__name__.startswith("FlowM") or bool(scheduler.config.get("use_flow_sigmas"))


def stock_call(inference: Inference, schedule: Schedule, guidance: Guidance = USUAL) -> StockCall:
    """An inference as a scheduler and a call of diffusers. schedule: the teacher's. ValueError where no stock scheduler does it."""
    if inference.steps < 1:
        raise ValueError(f"a sampler takes at least 1 step; found {inference.steps}")
    call = {"num_inference_steps": inference.steps, **guidance.none}
    if inference.guidance is not None and guidance.embedded is not None:
        call[guidance.embedded] = inference.guidance
    if isinstance(schedule, RectifiedFlow):
        return _flow(inference, call)
    if isinstance(schedule, VariancePreserving):
        return _variance_preserving(inference, call)
    raise ValueError(f"no stock scheduler samples on a {type(schedule).__name__}")


def _flow(inference: Inference, call: dict[str, Any]) -> StockCall:
    """A flow's sigmas are its times; the stock scheduler shifts those that it is given."""
    steps, nodes = inference.steps, inference.nodes
    if inference.end:
        raise ValueError(f"the stock schedulers of flows end on the data, at t = 0; found {inference.end:g}")
    if inference.noise not in (0, 1):
        raise ValueError("no stock scheduler of a flow adds a share of fresh noise: FlowMatchEulerDiscreteScheduler adds none, "
                         f"FlowMatchLCMScheduler all of it; found {inference.noise:g}")
    grid = [1 - i / steps for i in range(steps)] if nodes is None else [(nodes - nodes * i // steps) / nodes for i in range(steps)]
    call["sigmas"] = grid if inference.times is None else list(inference.times)
    config = AS_GIVEN | {"shift": inference.shift}
    if inference.noise:
        return StockCall("FlowMatchLCMScheduler", config, call)
    return StockCall("FlowMatchEulerDiscreteScheduler", config | {"stochastic_sampling": False}, call)


def _variance_preserving(inference: Inference, call: dict[str, Any]) -> StockCall:
    """TCDScheduler is the one that lands on node 0 rather than on the data, and the one for a share of fresh noise.

    Yin et al. 2024, arXiv:2405.14867, section 4.4, note x_0 again at equally spaced times: LCMScheduler's boundary scalings differ
    from that by less than 1e-6 there. Where `steps` do not divide 1000 its times are floor(1000 / steps) apart.
    """
    if inference.shift != 1:
        raise ValueError(f"the nodes of a discrete schedule are not shifted; found shift = {inference.shift:g}")
    nodes = {"original_inference_steps": inference.nodes or inference.steps}
    if inference.times is not None:
        if inference.noise != 1 or inference.end:
            raise ValueError("of the stock schedulers LCMScheduler alone takes a call's own times; they want fresh noise in each step, "
                             f"and the data as their end; found noise = {inference.noise:g}, end = {inference.end:g}")
        call["timesteps"] = [round(LEVELS * t) - 1 for t in inference.times]
    if inference.end:
        if round(inference.end * LEVELS, 9) != 1:
            raise ValueError(f"TCDScheduler ends at the data or at its first node, t = {1 / LEVELS}; found {inference.end:g}")
        return StockCall("TCDScheduler", nodes, call | {"eta": inference.noise})
    if inference.noise == 1:
        return StockCall("LCMScheduler", {**nodes, "timestep_scaling": TIMESTEP_SCALING, **UNCLIPPED}, call)
    if inference.noise or inference.nodes is not None:
        raise ValueError("no stock scheduler ends on the data after steps with a share of fresh noise, or takes even steps of a finer "
                         f"grid; found noise = {inference.noise:g}, nodes = {inference.nodes}")
    return _even_steps(inference, call)


def _even_steps(inference: Inference, call: dict[str, Any]) -> StockCall:
    """DDIM from t = 1 over equal steps, each of which lands where the next begins.

    DDIMScheduler, asked at time 1000 - 1000 i / steps - 1, rounded, lands floor(1000 / steps) below: where steps do not divide 1000
    the state is at another noise level than the network is told (3 steps: at 333, told 332). EulerDiscreteScheduler's trailing
    steps land where the next begin, whatever their number, but it starts from noise that is alpha^2 / 2 too small, 0.2 % for
    Stable Diffusion; so DDIMScheduler is taken where it serves.
    """
    steps = inference.steps
    if not inference.exact_grid and steps <= LEVELS and LEVELS % steps:
        config = {"timestep_spacing": "trailing", "timestep_type": "discrete", "interpolation_type": "linear", "final_sigmas_type": "zero",
                  "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
        return StockCall("EulerDiscreteScheduler", config, call)
    if LEVELS % steps:
        near = [max(d for d in DIVISORS if d < steps), *(d for d in DIVISORS if d > steps)][:2]
        raise ValueError(f"DDIMScheduler takes equal steps only where their number divides its {LEVELS} times; found {steps}, and "
                         f"{' or '.join(map(str, near))} would be right")
    return StockCall("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True, **UNCLIPPED}, call)


def sampler_of(stock: StockCall, schedule: Schedule, teacher: SchedulerMixin) -> Sampler:
    """The sampler that training and sampling share, read off the stock scheduler. ValueError for what it does not serve."""
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
