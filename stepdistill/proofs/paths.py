"""What the rows of a method's paths share: networks of few numbers, the order of updates, laws written out by hand.

A path is a choice of settings, steps and guidance that a recipe can make. On a path a method's updates are played as
the loop plays them, with networks that are affine in the state and in the prompt. Values and gradients are then known
in closed form: `known` of a method's own file writes them down from its paper, in float64, without the losses,
guidance, rollouts and laws of times of the code under test. It trusts the schedule, the draws and what a kind means.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import erf, log, sqrt, tan
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Batch, Pairs
from ..diffusion.draws import Step
from ..diffusion.guidance import self_guided
from ..diffusion.sampler import Sampler
from ..methods.base import Guidance, Method, Need
from .affine import Net
from .problem import BEYOND, Check, Elsewhere, Problem, difference, largest

COUNT, TOLERANCE = 24, 1e-7
FIXED = ("decode", "features", "reward")        # roles without numbers


def siblings(problem: Problem) -> list[Elsewhere]:
    """Those of the same seed and the same kind of noise, on other schedules."""
    kind = "velocity" if problem.name == "flow" else "v"           # where alpha ends near 0, eps has no x_0
    return [Elsewhere(problem.seed, problem.name, noise, kind) for noise in BEYOND[problem.name]]


@dataclass(frozen=True)
class Path:
    """What a recipe chooses. guidance: None is the problem's own scale, above 1. moments: indices of the steps played.

    elsewhere: the row is also measured on the schedules of `siblings`. within: the teacher is the student of a stage
    before, which has its guidance within. nodes: of the pairs.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1
    guidance: Guidance | None = None
    moments: tuple[int, ...] = (0,)
    elsewhere: bool = False
    within: bool = False
    nodes: int = 2


class Exact(Step):
    """A step whose noises are float64, so that rows hold to rounding."""

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return super().normal(name, shape).double()


# The order of updates ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Turn:
    """One optimizer step: whom it trains, on which batch, at which moment. before: the turn whose batch it shares.

    The method is given samples of shape (1, D, 1). All tensors here are flat, (B, D): text, null and x0 of the batch,
    its noises, the noise and the end of its pairs.
    """

    problem: Problem
    settings: Any
    path: Path
    roles: Mapping[str, Any]
    trains: tuple[str, ...]
    batch: Batch
    step: Step
    before: Turn | None = None

    @property
    def text(self) -> Tensor:
        return self.batch.cond.text

    @property
    def null(self) -> Tensor:
        return self.batch.cond.null.text

    @property
    def x0(self) -> Tensor:
        return self.batch.x0.flatten(1)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.batch.pairs.noise.flatten(1), self.batch.pairs.nodes[:, -1].flatten(1)

    @property
    def scale(self) -> float | Tensor:
        """Of this moment: the path's, uniform on a range."""
        w = self.problem.w if self.path.guidance is None else self.path.guidance
        w = 1.0 if self.path.within else w
        return w if isinstance(w, float) else w[0] + (w[1] - w[0]) * self.step.uniform("guidance")

    def noise(self, name: str) -> Tensor:
        return self.step.normal(name, (self.problem.dim,))

    def guided(self, w: float | Tensor, text: Tensor | None = None) -> Tensor:
        """The text at which an affine network says what guidance at w makes of it: null + w (text - null)."""
        w = torch.as_tensor(w, dtype=torch.float64).expand(len(self.null))[:, None]
        return self.null + w * ((self.text if text is None else text) - self.null)

    def noised(self, x: Tensor, t: Tensor, name: str = "noise") -> Tensor:
        return self.problem.schedule.alpha(t)[:, None] * x + self.problem.schedule.sigma(t)[:, None] * self.noise(name)


@dataclass(frozen=True)
class Known:
    """What is known of a turn: all losses by name, with their values where these say something, and flat gradients of
    their sum by role. All roles that are not named take none; of those in `unasked`, which the loop freezes at this
    moment, nothing is said."""

    values: Mapping[str, Tensor | None]
    slopes: Mapping[str, Tensor]
    unchecked: Sequence[str] = ()


def batch_of(problem: Problem, offset: int, count: int = 2) -> Batch:
    """Prompts, data, and pairs whose nodes are anything, all of one sample each."""
    shape = (1, problem.dim, 1)
    x0, noise, nodes = (problem.normal(*size, *shape) for size in ((COUNT,), (COUNT,), (COUNT, count)))
    times = torch.linspace(1, 0, count + 1, dtype=torch.float64)[1:].expand(COUNT, -1)
    pairs = Pairs(noise, nodes, times)
    ids = torch.arange(offset, offset + COUNT)
    return Batch(ids, problem.prompts(COUNT), x0, pairs=pairs, prompts=[f"{i}" for i in ids.tolist()])


@dataclass(frozen=True)
class Order:
    """One update as its paper has it, to be held against the method's own."""

    trains: tuple[str, ...]
    repeat: int = 1
    shares: int = 0
    since: int = 0


def turns(problem: Problem, path: Path, settings: Any, roles: Mapping[str, Any], orders: Sequence[Order],
          index: int) -> Iterator[Turn]:
    """A step of training, in order: repeats that share see the batch, and what was kept, of the run before them."""
    before: Turn | None = None
    for order in orders:
        for repeat in range(order.repeat if index >= order.since else 0):
            shared = before if repeat < order.shares else None
            batch = shared.batch if shared else batch_of(problem, int(problem.uniform(0, 1e6)), path.nodes)
            kept = shared.step.kept if shared else {}
            step = Exact(problem.seed, index, index / 100, "+".join(order.trains), repeat, batch.ids, kept=kept)
            turn = Turn(problem, settings, path, roles, order.trains, batch, step, shared)
            before = before if shared else turn
            yield turn


@dataclass(frozen=True)
class Algorithm:
    """A method as its paper has it. roles: a drawn network for each; orders, needs: of settings; known: of a turn.

    defaults: the published values of its settings. renoised: its sampler noises x_0 anew at each step, or of which
    settings it does; else it is DDIM.
    times: when the sampler of so many steps asks its network, where these are no even times.
    """

    method: type[Method]
    roles: Callable[[Problem, Any], dict[str, Any]]
    orders: Callable[[Any], list[Order]]
    needs: Callable[[Any], dict[str, Need]]
    known: Callable[[Turn], Known]
    defaults: Mapping[str, Any]
    renoised: bool | Callable[[Any], bool] = True
    times: Callable[[Problem, int], Sequence[float]] | None = None


def rows(algorithm: Algorithm, problem: Problem, paths: Sequence[Path]) -> Iterator[Check]:
    """A row of the defaults, and one a path: the worst of all its turns, on all schedules that it is measured on."""
    found = vars(algorithm.method.Settings())
    wrong = sum(found[name] != value for name, value in algorithm.defaults.items())
    yield Check("settings whose defaults are not the published ones", wrong, 0)
    others = siblings(problem)
    for path in paths:
        where = [problem, *(others if path.elsewhere else ())]
        figure = largest(*(apart(algorithm, each, path, index) for each in where for index in path.moments))
        name = f"{path.name}: losses and gradients of all roles against those by hand; relative"
        yield Check(name, figure, TOLERANCE)


def elsewhere(problem: Problem, forms: Callable[[Problem], Iterator[Check]]) -> Iterator[Check]:
    """A row for each schedule of `siblings`: the worst of all rows of `forms` there, over its tolerance."""
    for other in siblings(problem):
        checks = list(forms(other))
        figures = [check.figure / check.tolerance if check.tolerance else 2.0 * (not check.passed) for check in checks]
        yield Check(f"all rows above under {other.noise}: the largest figure over its tolerance", largest(*figures), 1)


def apart(algorithm: Algorithm, problem: Problem, path: Path, index: int) -> float:
    """The largest difference of a step of training from what is known of it; infinite where updates or roles differ."""
    settings = algorithm.method.Settings(**path.settings)
    orders, roles = algorithm.orders(settings), algorithm.roles(problem, settings)
    given = roles | ({"teacher": self_guided(roles["teacher"], False)} if path.within else {})
    w = problem.w if path.guidance is None else path.guidance
    inference = algorithm.method.inference(settings, path.steps, problem.schedule, w)
    method = algorithm.method(settings, given, w, problem.sampler(inference))
    updates = method.updates()
    made = [Order(update.trains, update.repeat, update.shares, update.since) for update in updates if update.every == 1]
    needs = [algorithm.method.needs(settings, full) for full in (False, True)]
    if made != orders or needs != [algorithm.needs(settings)] * 2 or inference.guidance != told(settings, w):
        return float("inf")
    losses = {update.trains: update.loss for update in updates}
    begun = [first(settings) * (1 - n / path.steps) for n in range(path.steps)]
    times = begun if algorithm.times is None else algorithm.times(problem, path.steps)
    fresh = algorithm.renoised if isinstance(algorithm.renoised, bool) else algorithm.renoised(settings)
    sample = off_sample(problem, method.sampler, roles["student"], times, fresh)
    return largest(sample, *(of_turn(losses[turn.trains](turn.batch, turn.step), algorithm.known(turn), turn)
                     for turn in turns(problem, path, settings, roles, orders, index)))


def told(settings: Any, w: Guidance) -> float | None:
    """The scale that a student with a guidance embedding is told where it is sampled: of a range its middle."""
    if not vars(settings).get("guidance_embedding"):
        return None
    return w if isinstance(w, float) else sum(w) / 2


def of_turn(losses: Mapping[str, Tensor], known: Known, turn: Turn) -> float:
    """The largest difference of values, relative, and of gradients, relative to a role's largest.

    Infinite where the losses are others.
    """
    if known.values.keys() != losses.keys():
        return float("inf")
    values = [(losses[name], value) for name, value in known.values.items() if value is not None]
    figures = [((found - value).abs() / (value.abs() + 1e-3)).item() for found, value in values]
    for name, role in turn.roles.items():
        if name in (*known.unchecked, *FIXED):
            continue
        numbers = list(role.numbers.values())
        found = torch.autograd.grad(sum(losses.values()), numbers, allow_unused=True, retain_graph=True)
        flat = torch.cat([torch.zeros(n.numel()) if g is None else g.flatten() for g, n in zip(found, numbers)])
        right = known.slopes.get(name, torch.zeros_like(flat))
        figures.append(((flat - right).abs().max() / right.abs().max().clamp(min=1e-3)).item())
    return largest(*figures)


# Laws and rollouts, by hand ------------------------------------------------------------------------

def stock_time(u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The times (i + 1) / 1000 with i from 1000 low to 1000 high, 999 at most, evenly, by their place u in [0, 1)."""
    first, last = round(1000 * low), min(round(1000 * high), 999)
    return (first + (u * (last - first + 1)).floor() + 1) / 1000


def noise_level(turn: Turn, u: Tensor, whole: bool = False) -> Tensor:
    """The time (B,) of a draw u by the law of the settings, in t_range or at all times: each stock time has the
    probability of the cell around it."""
    s, schedule = turn.settings, turn.problem.schedule
    low, high = (0.0, 1.0) if whole else s.t_range
    if s.noise_law == "uniform":
        return stock_time(u, low, high)
    times = range(round(1000 * low), min(round(1000 * high), 999) + 1)
    edges = [0.0 if i == 0 else (i + 0.5) / 1000 for i in times] + [min((times[-1] + 1.5) / 1000, 1.0)]

    def below(edge: float) -> float:
        if edge in (0.0, 1.0):
            return edge
        if s.noise_law == "shifted":
            return edge / (s.shift - (s.shift - 1) * edge)
        ratio = tan(schedule.angle(torch.tensor([edge], dtype=torch.float64)).item())
        return (1 + erf((log(ratio) - s.mean) / s.std / sqrt(2))) / 2
    shares = torch.tensor([below(b) - below(a) for a, b in pairwise(edges)], dtype=torch.float64)
    shares = shares / shares.sum()
    if s.noise_law == "mixture":
        shares = (shares + 1 / len(shares)) / 2
    place = torch.searchsorted(shares.cumsum(0), u, right=True).clamp(max=len(shares) - 1)
    return (times[0] + place + 1).double() / 1000


# defaults of most
NOISE = {"noise_law": "uniform", "t_range": (0.02, 0.98), "mean": -1.2, "std": 1.2, "shift": 3.0, "start_time": None}


def laws(**settings: Any) -> tuple[Path, ...]:
    """A path for each law of noise levels, and for each of its numbers, and for a first time below 1, of those that
    float32 has, in which stock schedulers of flows keep them."""
    return (Path("begun at 0.375, in one step", {"start_time": 0.375} | settings, elsewhere=True),
            Path("begun at 0.625, in one step, a range of guidance", {"start_time": 0.625} | settings,
                 guidance=(1.5, 4.0)),
            Path("log-normal levels", {"noise_law": "lognormal"} | settings),
            Path("log-normal levels, mean 0.4", {"noise_law": "lognormal", "mean": 0.4} | settings),
            Path("log-normal levels, std 0.6", {"noise_law": "lognormal", "std": 0.6} | settings),
            Path("shifted levels", {"noise_law": "shifted", "shift": 2.0} | settings),
            Path("a mixture of levels", {"noise_law": "mixture"} | settings))


def renoised(problem: Problem, x0: Tensor, x: Tensor, t: Tensor, r: Tensor, noise: Tensor) -> Tensor:
    """x_0 noised to r: with LCMScheduler's boundary, of 1e-6 at the times of few steps, on a VP schedule."""
    scaled = 10 * (1000 * t[0] - 1)
    if problem.name == "vp":
        x0 = scaled / (scaled**2 + 0.25).sqrt() * x0 + 0.25 / (scaled**2 + 0.25) * x
    return problem.schedule.alpha(r)[:, None] * x0 + problem.schedule.sigma(r)[:, None] * noise


def stepped(problem: Problem, x0: Tensor, x_t: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """DDIM from t > 0 to r, and (B,) how much of x_0 the landing holds."""
    kept = problem.schedule.sigma(r) / problem.schedule.sigma(t)
    share = problem.schedule.alpha(r) - kept * problem.schedule.alpha(t)
    return share[:, None] * x0 + kept[:, None] * x_t, share


def first(settings: Any) -> float:
    """The time of unit noise."""
    found = vars(settings).get("start_time")
    return 1.0 if found is None else found


def off_sample(problem: Problem, sampler: Sampler, student: Net, times: Sequence[float], fresh: bool) -> float:
    """How far the method's sampler ends from steps by hand, of x_0 that is noised anew or of DDIM; relative.

    times: of its steps, the first that of unit noise.
    """
    start, cond = problem.normal(COUNT, problem.dim), problem.prompts(COUNT)
    noises = problem.normal(len(times), COUNT, problem.dim)
    x = start
    for i, ends in enumerate(pairwise([*times, 0.0])):
        t, r = (torch.full((COUNT,), end, dtype=torch.float64) for end in ends)
        x0 = student.x0(x, t, cond.text)
        x = renoised(problem, x0, x, t, r, noises[i]) if fresh else stepped(problem, x0, x, t, r)[0]
    shape = (COUNT, 1, problem.dim, 1)
    found = sampler(student, start.reshape(shape), cond, lambda i: noises[i].reshape(shape)).detach()
    return difference(found.flatten(1), x)


@dataclass(frozen=True)
class Sample:
    """What a rollout ends with: x_0 (B, D), the network's input and time there, and the exit, from 1, as (B,)."""

    x: Tensor
    given: Tensor
    t: Tensor
    exit: Tensor


def rolled(turn: Turn, text: Tensor | None = None) -> Sample:
    """The student's own sample, by this turn's draws: x_0, noised anew to the next of even times, up to the exit."""
    student, steps = turn.roles["student"], turn.path.steps
    text = turn.text if text is None else text
    x, exit = turn.noise("start"), int(turn.step.shared("exit") * steps)
    t = torch.full((len(text),), first(turn.settings), dtype=torch.float64)
    for i in range(exit):
        r = t - 1 / steps
        x, t = renoised(turn.problem, student.x0(x, t, text), x, t, r, turn.noise(f"renoise {i}")), r
    return Sample(student.x0(x, t, text), x, t, torch.full_like(t, 1.0 + exit))


def output_scale(turn: Turn, t: Tensor) -> Tensor:
    """(B,) how much a network's raw output moves with its x_0, at a fixed x_t, by its kind."""
    s, kind = turn.problem.schedule, turn.problem.kind
    alpha, sigma = s.alpha(t), s.sigma(t)
    return {"eps": -alpha / sigma, "v": -(alpha**2 + sigma**2) / sigma,
            "velocity": s.d_alpha(t) - s.d_sigma(t) * alpha / sigma}[kind]


def denoised(turn: Turn, x: Tensor, t: Tensor, text: Tensor, weight: Tensor,
             w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A critic's loss mean weight |x_0 - x|^2 at x noised to t, and its flat gradient. weight (B,)."""
    x_t, critic = turn.noised(x, t), turn.roles["critic"]
    off = critic.x0(x_t, t, text, w) - x
    pull = 2 * weight[:, None] * off / off.numel()
    return (weight * off.square().mean(1)).mean(), critic.slopes(pull, x_t, t, text, w)
