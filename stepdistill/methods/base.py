"""What a distillation method is: the roles it needs, and a list of updates over them."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..diffusion.consistency import TIMESTEP_SCALING
from ..diffusion.contracts import Batch, Role
from ..diffusion.draws import Step
from ..diffusion.sampler import Sampler
from ..diffusion.schedule import Schedule
from ..diffusion.times import LEVELS, NOISE_LAWS, Law, NoiseLaw, noise_law

# Of a flow's scheduler that takes a call's sigmas as they are, whatever the teacher's own grid.
AS_GIVEN = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False,
            "use_exponential_sigmas": False, "use_beta_sigmas": False}
DIVISORS = tuple(d for d in range(1, LEVELS + 1) if LEVELS % d == 0)
Losses = dict[str, Tensor]        # scalars; their sum is the objective, each is logged under its name
Guidance = float | tuple[float, float]


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens at this one; None is never."""
    return every is not None and step % every == 0


@dataclass(frozen=True)
class Frozen:
    """The teacher: never trained."""


@dataclass(frozen=True)
class Trained:
    """A role that updates train: an adapter on the network of `start`, or a copy of it, which it equals at first.

    told_w: the network also reads `cond.w`, the guidance scale or a critic's exit, through an embedding that contributes nothing
    at first.
    """

    start: str = "teacher"
    told_w: bool = False


@dataclass(frozen=True)
class Follows:
    """The running average of another role after each of its updates: x <- decay x + (1 - decay) leader."""

    leader: str
    decay: float


@dataclass(frozen=True)
class Heads:
    """A discriminator: small trained heads that judge the features of another role's network, `of`.

    pair: they judge two noisy states at once, discriminator.pair(x_r, r, x_t, t, cond).
    """

    of: str
    pair: bool = False


@dataclass(frozen=True)
class Codec:
    """The teacher's decoder: latents (B, ...) -> pixels (B, 3, H, W), [-1, 1] and a little beyond, with gradients to the latents."""


@dataclass(frozen=True)
class Features:
    """A frozen vision network: pixels -> a list of feature maps, with gradients to the pixels.

    Heads of it are called discriminator(maps, cond).
    """


Need = Frozen | Trained | Follows | Heads | Codec | Features
FIXED = (Frozen, Codec, Features)            # what never changes


@dataclass(frozen=True)
class Update:
    """Train these roles, and only these, on this loss."""

    trains: tuple[str, ...]
    loss: Callable[[Batch, Step], Losses]
    every: int = 1                # run on steps divisible by `every`
    repeat: int = 1               # optimizer steps per run, each on a fresh batch
    shares: int = 0               # of these the first so many see the batch of the run before them, and its `step.kept`

    @property
    def name(self) -> str:
        return "+".join(self.trains)

    def due(self, step: int) -> bool:
        return due(step, self.every)


@dataclass(frozen=True)
class Inference:
    """How a student is sampled: a stock scheduler and the literal keyword arguments of the pipeline call.

    `scheduler` names a class of diffusers; `config` is changed on top of the teacher's own scheduler config.
    """

    scheduler: str
    config: Mapping[str, Any]
    call: Mapping[str, Any]


def renoised(steps: int, schedule: str) -> Inference:
    """The sampler of distribution matching: x_0, noised again to the next of `steps` equally spaced times.

    Yin et al. 2024, arXiv:2405.14867, section 4.4. LCMScheduler's own boundary scalings differ from it by less than
    1e-6 at these times. Where `steps` do not divide 1000 its times are floor(1000 / steps) apart. A flow's sigmas are its
    times, whatever the shift of the teacher's own grid.
    """
    call = {"num_inference_steps": steps, "guidance_scale": 1.0}       # in the pipeline, 1 switches guidance off
    if schedule == "vp":
        return Inference("LCMScheduler", {"original_inference_steps": steps, "timestep_scaling": TIMESTEP_SCALING, "clip_sample": False,
                                          "thresholding": False}, call)
    return Inference("FlowMatchLCMScheduler", AS_GIVEN, call | {"sigmas": [1 - i / steps for i in range(steps)]})


def deterministic(steps: int, schedule: str) -> Inference:
    """The sampler of trajectory methods: DDIM from t = 1 over `steps` equal steps, each of which lands where the next begins.

    ValueError where the stock scheduler does not. DDIMScheduler, told time 1000 - 1000 i / steps - 1, rounded, lands
    floor(1000 / steps) below: where steps do not divide 1000 the state is at another noise level than the network is told
    (3 steps: at 333, told 332). A flow's sigmas are its times, whatever the shift of the teacher's own grid.
    """
    if steps < 1:
        raise ValueError(f"a sampler takes at least 1 step; found {steps}")
    call = {"num_inference_steps": steps, "guidance_scale": 1.0}       # in the pipeline, 1 switches guidance off
    if schedule == "flow":
        config = {**AS_GIVEN, "stochastic_sampling": False}
        return Inference("FlowMatchEulerDiscreteScheduler", config, call | {"sigmas": [1 - i / steps for i in range(steps)]})
    if LEVELS % steps:
        near = [max(d for d in DIVISORS if d < steps), *(d for d in DIVISORS if d > steps)][:2]
        raise ValueError(f"DDIMScheduler takes equal steps only where their number divides its {LEVELS} times; found {steps}, and "
                         f"{' or '.join(map(str, near))} would be right")
    config = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False, "thresholding": False}
    return Inference("DDIMScheduler", config, call)


def sigmas_of_nodes(steps: int, nodes: int) -> list[float]:
    """The `sigmas` of a flow's call, `steps` of the `nodes` ends of equal segments, chosen as LCMScheduler chooses times."""
    return [(nodes - nodes * i // steps) / nodes for i in range(steps)]


class NoiseSettings(Protocol):
    """The entries of a method's settings that say at which noise levels student and critic are trained.

    noise_law, t_range, mean, std, shift: see `times.noise_law`.
    """

    noise_law: NoiseLaw
    t_range: tuple[float, float]
    mean: float
    std: float
    shift: float


def check_noise(settings: NoiseSettings) -> None:
    """ValueError for noise settings that no law has."""
    low, high = settings.t_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"t_range must be an interval in [0, 1]; found {settings.t_range}")
    if settings.noise_law not in NOISE_LAWS:
        raise ValueError(f"noise_law is one of {', '.join(NOISE_LAWS)}; found {settings.noise_law!r}")
    if settings.std <= 0 or settings.shift <= 0:
        raise ValueError(f"std and shift must be above 0; found {settings.std}, {settings.shift}")


def noise_levels(settings: NoiseSettings, schedule: Schedule, whole: bool = False) -> Law:
    """The law of the settings, in t_range; whole: at all times, for a critic that is to know more than it is asked."""
    t_range = (0.0, 1.0) if whole else settings.t_range
    return noise_law(settings.noise_law, schedule, t_range, settings.mean, settings.std, settings.shift)


def middle(guidance: Guidance) -> float:
    """A scale as it is, of a range its middle."""
    return float(guidance) if isinstance(guidance, int | float) else sum(guidance) / 2


def equal_steps(steps: int, schedule: str, scale: float = 1.0) -> Inference:
    """`deterministic`, and for other numbers of steps on a VP schedule one that rounds its times: a halving of 16 steps has them.

    EulerDiscreteScheduler's trailing steps land where the next begin, whatever their number. It starts from noise that is
    alpha^2 / 2 too small, 0.2 % for Stable Diffusion; DDIMScheduler, which does not, is taken where it serves. scale: what a
    student that is told a guidance scale is told.
    """
    if schedule == "vp" and 1 <= steps <= LEVELS and LEVELS % steps:
        config = {"timestep_spacing": "trailing", "timestep_type": "discrete", "interpolation_type": "linear", "final_sigmas_type": "zero",
                  "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
        return Inference("EulerDiscreteScheduler", config, {"num_inference_steps": steps, "guidance_scale": scale})
    found = deterministic(steps, schedule)
    return replace(found, call={**found.call, "guidance_scale": scale})


class Method(ABC):
    """Subclasses are final: one file, one paper, no method inherits from another method.

    A method sees its roles as callables only, so that the same file runs on a closed-form denoiser, a full network
    and an adapter. `settings` is the method's own frozen dataclass, `guidance` the recipe's: a scale, a range of
    scales [low, high], in the convention where 1 is conditional only; `sampler` the very one that samples and exports the
    student, at the number of evaluations that it is made for.
    """

    Settings: ClassVar[type]
    data: ClassVar[tuple[str, ...]]               # what it can train on, as in a recipe: "images", "samples", "pairs", "prompts"

    def __init__(self, settings: Any, roles: Mapping[str, Role], guidance: Guidance, sampler: Sampler) -> None:
        self.settings, self.roles, self.guidance, self.sampler = settings, roles, guidance, sampler

    @classmethod
    def refusal(cls, settings: Any, data: str) -> str | None:
        """Why these settings cannot train on this kind of `data`, and what would be right; None where they can."""
        return None

    @classmethod
    def succession(cls, steps: int, before: int) -> str | None:
        """Why a student of `before` evaluations cannot teach one of `steps`, stage after stage, and what would be right."""
        return None

    @classmethod
    def waypoints(cls, settings: Any, steps: int) -> int:
        """The fewest evenly spaced states of the teacher's way, its end among them, that pairs must keep; multiples do as well."""
        return 1

    @classmethod
    @abstractmethod
    def needs(cls, settings: Any, full: bool) -> dict[str, Need]:
        """Role name -> what it is. `full`: the student trains all its weights rather than an adapter."""

    @classmethod
    @abstractmethod
    def inference(cls, settings: Any, steps: int, schedule: str, guidance: Guidance = 1.0) -> Inference:
        """The stock scheduler that serves `steps` evaluations. schedule: "vp" or "flow". ValueError if none does.

        guidance: the recipe's. It reaches the call only where the student is told its scale.
        """

    @abstractmethod
    def updates(self) -> list[Update]: ...
