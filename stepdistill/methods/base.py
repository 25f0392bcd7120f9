"""What a distillation method is: the roles it needs, and a list of updates over them."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from ..diffusion.contracts import Batch, Role
from ..diffusion.draws import Step
from ..diffusion.mixing import Output
from ..diffusion.sampler import Sampler
from ..diffusion.schedule import Schedule, VariancePreserving
from ..diffusion.times import LEVELS, NOISE_LAWS, Law, NoiseLaw, noise_law
from ..losses.regression import DISTANCES

Losses = dict[str, Tensor]        # scalars; their sum is the objective, each is logged under its name
Guidance = float | tuple[float, float]


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens at this one; None is never."""
    return every is not None and step % every == 0


@dataclass(frozen=True)
class Frozen:
    """The teacher: never trained.

    within: as the student of a stage before it has its guidance within, and is not guided again; False: that student
    keeps its answer to no prompt, and is guided as the base is.
    """

    within: bool = True


@dataclass(frozen=True)
class Trained:
    """A role that updates train: an adapter on the network of `start`, or a copy of it, which it equals at first.

    reads: names of numbers in `cond.extra` that its network also reads, through an embedding that contributes nothing
    at first: "w", the guidance scale or a critic's exit, "r", the time to land on, "share", of data in a mixture.
    solver: its network is the teacher's and stays so; trained are the shares of a solver of its own, 0 at first, of
    this output's changes (`mixing.Mixing`). None: its network is trained.
    """

    start: str = "teacher"
    reads: tuple[str, ...] = ()
    solver: Output | None = None


@dataclass(frozen=True)
class Follows:
    """The running average of another role after each of its updates: x <- decay x + (1 - decay) leader.

    until: the training step from which on it stays as it is; at decay 0 it is then a record of its leader, of 0 the
    leader as it begins. None: it follows to the end.
    """

    leader: str
    decay: float
    until: int | None = None

    @property
    def moves(self) -> bool:
        return self.until != 0


HeadKind = Literal["pooled", "tokens", "channels"]


@dataclass(frozen=True)
class Heads:
    """A discriminator: small trained heads that judge the features of another role's network, `of`.

    pair: they judge two noisy states at once, discriminator.pair(x_r, r, x_t, t, cond).
    kind: "pooled" gives one logit a feature, (B, K); "tokens" K maps of logits, (B, N) each, one at every position of a
    feature, of heads that are told the prompt and, beside a network of noise levels, t; "channels" the same, but of the
    mean over a feature's channels, which has no weights to train.
    nodes: heads of a feature, of the kind "tokens"; of more than one each judges at a part of time of its own, those
    nearest to 0, 1 / nodes .. 1 - 1 / nodes.
    """

    of: str
    pair: bool = False
    kind: HeadKind = "pooled"
    nodes: int = 1


@dataclass(frozen=True)
class Codec:
    """The teacher's decoder: latents (B, ...) -> pixels (B, 3, H, W), [-1, 1] and a little beyond, with gradients to
    the latents."""


@dataclass(frozen=True)
class Features:
    """A frozen vision network: pixels -> a list of feature maps, with gradients to the pixels.

    Heads of it are of the kind "tokens", and called discriminator(maps, cond).
    """


@dataclass(frozen=True)
class Reward:
    """A frozen judge: reward(pixels, prompts) -> (B,), higher is better, with gradients to the pixels. Batches then
    hold their prompts. Which one, the recipe says (`reward`)."""


Need = Frozen | Trained | Follows | Heads | Codec | Features | Reward
FIXED = (Frozen, Codec, Features, Reward)            # what never changes


@dataclass(frozen=True)
class Update:
    """Train these roles, and only these, on this loss."""

    trains: tuple[str, ...]
    loss: Callable[[Batch, Step], Losses]
    every: int = 1                # run on steps divisible by `every`
    repeat: int = 1               # optimizer steps per run, each on a fresh batch
    shares: int = 0               # of these the first so many see the batch of the run before them, and its `step.kept`
    since: int = 0                # the first training step at which it runs

    @property
    def name(self) -> str:
        return "+".join(self.trains)

    def due(self, step: int) -> bool:
        return step >= self.since and due(step, self.every)


@dataclass(frozen=True)
class Inference:
    """How a student is sampled, in words of the mathematics; the teacher's family spells it for its stock pipeline.

    steps: evaluations of the network. noise: the share of fresh noise in each step: 0 is DDIM's or Euler's step, 1 is
    x_0 noised again to the next time (Luo et al. 2023, arXiv:2310.04378), between them is TCD's gamma. nodes: the even
    grid from which `steps` times are taken; None: steps. times: the times themselves, descending in [0, 1], where they
    are no even grid. end: where the last step lands, 0 the data. shift: of a flow's nodes towards noise. guidance: what
    the student's guidance embedding reads; None where it has none. cfg: the scale at which the pipeline itself guides,
    at two evaluations a step; 1 where it does not. exact_grid: every step lands where the next begins and the network
    is asked; False: times may be rounded to those that a discrete schedule has.
    """

    steps: int
    noise: float = 0.0
    nodes: int | None = None
    times: tuple[float, ...] | None = None
    end: float = 0.0
    shift: float = 1.0
    guidance: float | None = None
    cfg: float = 1.0
    exact_grid: bool = True


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
    """ValueError for noise settings that no law has, and for an entry of RULES that breaks its rule."""
    low, high = settings.t_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"t_range must be an interval in [0, 1]; found {settings.t_range}")
    if settings.noise_law not in NOISE_LAWS:
        raise ValueError(f"noise_law is one of {', '.join(NOISE_LAWS)}; found {settings.noise_law!r}")
    if settings.std <= 0 or settings.shift <= 0:
        raise ValueError(f"std and shift must be above 0; found {settings.std}, {settings.shift}")
    check(settings)


def noise_levels(settings: NoiseSettings, schedule: Schedule, whole: bool = False) -> Law:
    """The law of the settings, in t_range; whole: at all times, for a critic that is to know more than it is asked."""
    t_range = (0.0, 1.0) if whole else settings.t_range
    return noise_law(settings.noise_law, schedule, t_range, settings.mean, settings.std, settings.shift)


class StartSettings(Protocol):
    """The entry of the settings of a method whose students begin in pure noise.

    start_time: as which noise level the network is told its first, unit noise, in (0, 1]; None: t = 1.
    """

    start_time: float | None


def renoising(settings: StartSettings, steps: int) -> Inference:
    """x_0 noised anew at even times from t = 1, or x_0 of unit noise that is told to be of `start_time`.

    At t = 1 a teacher says little more than the mean of its data, of any noise; below, its x_0 differ from noise to
    noise as pictures do, so that a one-step student begins nearer to its end. ValueError for more than one step from
    another time than 1.
    """
    if settings.start_time is None:
        return Inference(steps, noise=1.0)
    if steps != 1:
        raise ValueError("start_time is where a student of one step begins, and one of more steps begins at t "
                         f"= 1: leave it out; found start_time = {settings.start_time:g} and {steps} steps")
    return Inference(steps, noise=1.0, times=(settings.start_time,))


# Entries that the settings of several methods share: what must hold of them, and how it is said. nodes, skip and shift
# are of the teacher's grid, `triples.grid(nodes, shift)`, with skip nodes from t to s; loss and huber_c those of
# `regression.distance`; start_time is `renoising`'s.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "skip": (lambda s: 1 <= s.skip <= s.nodes, "from 1 to nodes = {s.nodes}"),
    "shift": (lambda s: s.shift > 0, "above 0, where 1 leaves all uniform"),
    "loss": (lambda s: s.loss in DISTANCES, f"one of {', '.join(DISTANCES)}"),
    "huber_c": (lambda s: s.huber_c > 0, "above 0"),
    "target_decay": (lambda s: 0 <= s.target_decay < 1, "in [0, 1)"),
    "drop": (lambda s: 0 <= s.drop < 1, "in [0, 1)"),
    "gan_weight": (lambda s: s.gan_weight >= 0, "at least 0, which leaves the discriminator out"),
    "critic_gan_weight": (lambda s: s.critic_gan_weight >= 0, "at least 0"),
    "gan_start": (lambda s: s.gan_start >= 0, "at least 0"),
    "start_time": (lambda s: s.start_time is None or 1 / LEVELS <= s.start_time <= 1,
                   f"a time from {1 / LEVELS}, the least that a network is told, to 1"),
}


# Entries that count what one update does, or the places of a grid: beyond MOST a number is a slip, and a step without
# end.
COUNTS, MOST = ("nodes", "critic_steps", "langevin_steps", "rollout_steps", "solver_steps", "substeps", "state_steps",
                "ends", "bridge_steps", "first_nodes", "last_nodes", "records"), 10_000


def check_counts(settings: Any) -> None:
    """ValueError for settings with an entry of COUNTS that is none."""
    for name in COUNTS:
        if name in vars(settings) and not 1 <= vars(settings)[name] <= MOST:
            raise ValueError(f"{name} must be at least 1, and at most {MOST:,}; found {vars(settings)[name]}")


def check(settings: Any) -> None:
    """ValueError for settings with an entry of COUNTS that is none, or one of RULES that breaks its rule."""
    check_counts(settings)
    for name, (holds, what) in RULES.items():
        if name in vars(settings) and not holds(settings):
            raise ValueError(f"{name} must be {what.format(s=settings)}; found {vars(settings)[name]!r}")


def check_fit(method: str, settings: Any, steps: int, schedule: Schedule) -> None:
    """ValueError where a stock sampler of `steps` steps would not ask the student at nodes of the settings' grid."""
    if not 1 <= steps <= settings.nodes:
        raise ValueError(f"{method} with nodes = {settings.nodes} serves 1 to {settings.nodes} steps; found {steps}")
    if isinstance(schedule, VariancePreserving) and (LEVELS % settings.nodes or settings.shift != 1):
        raise ValueError(f"{method} on a variance-preserving teacher wants nodes that divide {LEVELS}, its times, and "
                         f"no shift; found nodes = {settings.nodes}, shift = {settings.shift}")


def check_told(method: str, count: int, schedule: Schedule) -> None:
    """ValueError where so many even steps of the teacher, from noise to data, would tell it times below its first."""
    if isinstance(schedule, VariancePreserving) and count > LEVELS:
        raise ValueError(f"{method} asks a variance-preserving teacher at {count:,} even times, and it has {LEVELS}: "
                         "take fewer nodes, or fewer steps between two of them")


def halving(method: str, steps: int, before: int) -> str | None:
    """Why a student of `before` evaluations cannot teach one of `steps` that takes one step where it takes two."""
    if before == 2 * steps:
        return None
    return (f"its teacher takes two steps where {method}'s student takes one, so the stage before has {2 * steps}. A "
            f"halving to {steps} begins at a power of two times {steps}")


def check_halving(method: str, steps: int, schedule: Schedule) -> None:
    """ValueError where a schedule has too few times for a teacher that takes two steps for each of the student's."""
    if isinstance(schedule, VariancePreserving) and 2 * steps > LEVELS:
        raise ValueError(f"the teacher of {method} takes two steps for each, and has {LEVELS} times; found "
                         f"{steps} steps")


def middle(guidance: Guidance) -> float:
    """A scale as it is, of a range its middle."""
    return float(guidance) if isinstance(guidance, int | float) else sum(guidance) / 2


class Method(ABC):
    """Subclasses are final: one file, one paper, no method inherits from another method.

    A method sees its roles as callables only, so that the same file runs on a closed-form denoiser, a full network
    and an adapter. `settings` is the method's own frozen dataclass, `guidance` the recipe's: a scale, a range of
    scales [low, high], in the convention where 1 is conditional only; `sampler` the very one that samples and exports
    the student, at the number of evaluations that it is made for.
    """

    Settings: ClassVar[type]
    data: ClassVar[tuple[str, ...]]               # what it can train on, as in a recipe: "images", "samples", "pairs",
                                                  # "prompts"
    as_before: ClassVar[bool] = False             # its student is sampled as that of the stage before, if there is one

    def __init__(self, settings: Any, roles: Mapping[str, Role], guidance: Guidance, sampler: Sampler) -> None:
        self.settings, self.roles, self.guidance, self.sampler = settings, roles, guidance, sampler

    @classmethod
    def refusal(cls, settings: Any, data: str) -> str | None:
        """Why these settings cannot train on this kind of `data`, and what would be right; None where they can."""
        return None

    @classmethod
    def succession(cls, steps: int, before: int) -> str | None:
        """Why a student of `before` evaluations cannot teach one of `steps`, stage after stage, and what would be
        right."""
        return None

    @classmethod
    def waypoints(cls, settings: Any, steps: int) -> int:
        """The fewest evenly spaced states of the teacher's way, its end among them, that pairs must keep; multiples do
        as well."""
        return 1

    @classmethod
    @abstractmethod
    def needs(cls, settings: Any, full: bool) -> dict[str, Need]:
        """Role name -> what it is. `full`: the student trains all its weights rather than an adapter."""

    @classmethod
    @abstractmethod
    def inference(cls, settings: Any, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        """How a student of `steps` evaluations is sampled. schedule: the teacher's. ValueError where the settings do
        not serve it.

        guidance: the recipe's. Only a student with a guidance embedding reads it.
        """

    @property
    def denoiser(self) -> Role | None:
        """The critic as its loss asks it to denoise the student's samples; None where no role does. Whoever looks how
        far it lags behind them asks this one."""
        return self.roles.get("critic")

    @abstractmethod
    def updates(self) -> list[Update]: ...
