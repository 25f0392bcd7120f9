"""What the rows of a method's paths share: networks of few numbers, the order of updates, laws written out by hand.

A path is a choice of settings, steps and guidance that a recipe can make. On a path a method's updates are played as
the loop plays them, with networks that are affine in the state and in the prompt. Values and gradients are then known
in closed form: `known` of a method's own file writes them down from its paper, in float64, without the losses, guidance,
rollouts and laws of times of the code under test. What it trusts is the schedule, the draws and what a kind means.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..diffusion.contracts import Batch, Condition, Pairs
from ..diffusion.draws import Step
from ..diffusion.prediction import Prediction, truth
from ..diffusion.schedule import Schedule
from ..methods.base import Guidance, Method, Need
from .problem import Check, Law, Problem, largest

COUNT, TOLERANCE = 24, 1e-7
VP = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
NOISES: dict[str, Callable[[], Any]] = {
    "zero terminal SNR": lambda: DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                               rescale_betas_zero_snr=True, prediction_type="v_prediction", **VP),
    "cosine": lambda: DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", **VP),
    "linear": lambda: DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **VP),
    "flow with shift 3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


class Under(Problem):
    """The problem of a seed under another noise than Stable Diffusion's or a plain flow's. noise: a key of NOISES."""

    def __init__(self, seed: int, noise: str) -> None:
        self.noise = noise
        super().__init__(seed, "flow" if noise.startswith("flow") else "vp")
        if self.name == "vp":                                   # where alpha ends near 0, eps has no x_0
            self.kind = "v"
            self.teacher = Law(self.schedule, self.covariance, self.kind)

    def _scheduler(self) -> Any:
        return NOISES[self.noise]()


def siblings(problem: Problem) -> list[Under]:
    """Those of the same seed and the same kind of noise, on other schedules."""
    flow = problem.name == "flow"
    return [Under(problem.seed, noise) for noise in NOISES if noise.startswith("flow") == flow]


@dataclass(frozen=True)
class Path:
    """What a recipe chooses. guidance: None is the problem's own scale, above 1. moments: indices of the steps played.

    elsewhere: the row is also measured on the schedules of `siblings`.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1
    guidance: Guidance | None = None
    moments: tuple[int, ...] = (0,)
    elsewhere: bool = False


class Exact(Step):
    """A step whose noises are float64, so that rows hold to rounding."""

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return super().normal(name, shape).double()


# Networks ------------------------------------------------------------------------------------------

@dataclass
class Net:
    """A role whose x_0 is m + (1 + t) S x_t + U text + p t + q w, put as a network of its kind puts it.

    w is 0 where the condition has none.
    """

    schedule: Schedule
    kind: str
    numbers: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem, kind: str | None = None) -> Net:
        vector, matrix = (problem.dim,), (problem.dim, problem.dim)
        shapes = {"m": vector, "S": matrix, "U": matrix, "p": vector, "q": vector}
        numbers = {name: (0.6 * problem.normal(*shape)).requires_grad_() for name, shape in shapes.items()}
        return cls(problem.schedule, kind or problem.kind, numbers)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        x0 = self._affine(x_t, t, cond.text, cond.w)
        eps = (x_t - self.schedule.alpha(t)[:, None] * x0) / self.schedule.sigma(t)[:, None]
        return Prediction(truth(x0, eps, t, self.schedule, self.kind), x_t, t, self.schedule, self.kind)

    def _affine(self, x: Tensor, t: Tensor, text: Tensor, w: Tensor | None) -> Tensor:
        n, t = self.numbers, t[:, None]
        told = 0 if w is None else w[:, None] * n["q"]
        return n["m"] + (1 + t) * (x @ n["S"].T) + text @ n["U"].T + t * n["p"] + told

    @torch.no_grad()
    def x0(self, x: Tensor, t: Tensor, text: Tensor, w: Tensor | None = None) -> Tensor:
        """(B, D), no gradient. A guided network is this one at the guided text, since it is affine in text."""
        return self._affine(x, t, text, w)

    def slopes(self, pull: Tensor, x: Tensor, t: Tensor, text: Tensor, w: Tensor | None = None) -> Tensor:
        """Of a loss in all numbers, flat, where `pull` (B, D) is its slope in x_0."""
        told = torch.zeros(len(x), dtype=torch.float64) if w is None else w
        parts = pull.sum(0), pull.T @ ((1 + t)[:, None] * x), pull.T @ text, pull.T @ t, pull.T @ told
        return torch.cat([part.flatten() for part in parts])

    def back(self, pull: Tensor, t: Tensor) -> Tensor:
        """The slope in x_t (B, D) that `pull`, a slope in x_0, makes."""
        return (1 + t)[:, None] * (pull @ self.numbers["S"].detach())


@dataclass
class QuadraticHeads:
    """K logits z Q z + u z + c s + e text + o w of features z (B, F), levels s (B, L) and the prompt."""

    numbers: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem, features: int, levels: int = 1, count: int = 2) -> QuadraticHeads:
        shapes = {"Q": (count, features, features), "u": (count, features), "c": (count, levels),
                  "e": (count, problem.dim), "o": (count,)}
        return cls({name: (0.3 * problem.normal(*shape)).requires_grad_() for name, shape in shapes.items()})

    def __call__(self, z: Tensor, s: Tensor, cond: Condition) -> Tensor:
        n = self.numbers
        logits = torch.einsum("bf,kfg,bg->bk", z, n["Q"], z) + z @ n["u"].T + s @ n["c"].T + cond.text @ n["e"].T
        return logits if cond.w is None else logits + cond.w[:, None] * n["o"]

    def slopes(self, pull: Tensor, z: Tensor, s: Tensor, text: Tensor, w: Tensor | None = None) -> Tensor:
        """Of a loss in all numbers, flat, where `pull` (B, K) is its slope in the logits."""
        told = torch.zeros(len(z), dtype=torch.float64) if w is None else w
        parts = torch.einsum("bk,bf,bg->kfg", pull, z, z), pull.T @ z, pull.T @ s, pull.T @ text, pull.T @ told
        return torch.cat([part.flatten() for part in parts])

    def back(self, pull: Tensor, z: Tensor) -> Tensor:
        """The slope in z (B, F) that `pull`, a slope in the logits, makes."""
        Q, u = self.numbers["Q"].detach(), self.numbers["u"].detach()
        return torch.einsum("bk,kfg,bg->bf", pull, Q + Q.mT, z) + pull @ u


# The order of updates ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Turn:
    """One optimizer step: whom it trains, on which batch, at which moment. before: the turn whose batch it shares.

    text, null (B, D): the batch's prompts and their null.
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
    def scale(self) -> float | Tensor:
        """Of this moment: the path's, uniform on a range."""
        w = self.problem.w if self.path.guidance is None else self.path.guidance
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
    """What is known of a turn: values of losses by name, and flat gradients of their sum by role. All roles that are
    not named take none; of those in `unasked`, which the loop freezes at this moment, nothing is said."""

    values: Mapping[str, Tensor]
    slopes: Mapping[str, Tensor]
    unasked: Sequence[str] = ()


def batch_of(problem: Problem, offset: int) -> Batch:
    """Prompts, data, and pairs whose nodes are anything, all of one sample each."""
    x0, noise = problem.normal(COUNT, problem.dim), problem.normal(COUNT, problem.dim)
    times = torch.tensor([[0.5, 0.0]], dtype=torch.float64).expand(COUNT, -1)
    pairs = Pairs(noise, problem.normal(COUNT, 2, problem.dim), times)
    return Batch(torch.arange(offset, offset + COUNT), problem.prompts(COUNT), x0, pairs=pairs)


@dataclass(frozen=True)
class Order:
    """One update as its paper has it, to be held against the method's own."""

    trains: tuple[str, ...]
    repeat: int = 1
    shares: int = 0


def turns(problem: Problem, path: Path, settings: Any, roles: Mapping[str, Any], orders: Sequence[Order],
          index: int) -> Iterator[Turn]:
    """A step of training, in order: repeats that share see the batch, and what was kept, of the run before them."""
    before: Turn | None = None
    for order in orders:
        for repeat in range(order.repeat):
            shared = before if repeat < order.shares else None
            batch = shared.batch if shared else batch_of(problem, int(problem.uniform(0, 1e6)))
            kept = shared.step.kept if shared else {}
            step = Exact(problem.seed, index, index / 100, "+".join(order.trains), repeat, batch.ids, kept=kept)
            turn = Turn(problem, settings, path, roles, order.trains, batch, step, shared)
            before = before if shared else turn
            yield turn


@dataclass(frozen=True)
class Algorithm:
    """A method as its paper has it. roles: a drawn network for each; orders, needs: of settings; known: of a turn."""

    method: type[Method]
    roles: Callable[[Problem, Any], dict[str, Any]]
    orders: Callable[[Any], list[Order]]
    needs: Callable[[Any], dict[str, Need]]
    known: Callable[[Turn], Known]


def rows(algorithm: Algorithm, problem: Problem, paths: Sequence[Path]) -> Iterator[Check]:
    """A row a path: the worst of all its turns, on all schedules that it is measured on."""
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
    method = algorithm.method(settings, roles, problem.w if path.guidance is None else path.guidance,
                              problem.sampler(algorithm.method.inference(settings, path.steps, problem.name)))
    updates = method.updates()
    made = [Order(update.trains, update.repeat, update.shares) for update in updates if update.every == 1]
    if made != orders or algorithm.method.needs(settings, False) != algorithm.needs(settings):
        return float("inf")
    losses = {update.trains: update.loss for update in updates}
    return largest(*(of_turn(losses[turn.trains](turn.batch, turn.step), algorithm.known(turn), turn)
                     for turn in turns(problem, path, settings, roles, orders, index)))


def of_turn(losses: Mapping[str, Tensor], known: Known, turn: Turn) -> float:
    """The largest difference of values, relative, and of gradients, relative to a role's largest."""
    figures = [((losses[name] - value).abs() / (value.abs() + 1e-3)).item() for name, value in known.values.items()]
    for name, role in turn.roles.items():
        if name in known.unasked or not hasattr(role, "numbers"):
            continue
        numbers = list(role.numbers.values())
        found = torch.autograd.grad(sum(losses.values()), numbers, allow_unused=True, retain_graph=True)
        flat = torch.cat([torch.zeros(n.numel()) if g is None else g.flatten() for g, n in zip(found, numbers)])
        right = known.slopes.get(name, torch.zeros_like(flat))
        figures.append(((flat - right).abs().max() / right.abs().max().clamp(min=1e-3)).item())
    return largest(*figures)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


# Laws and rollouts, by hand ------------------------------------------------------------------------

def stock_time(u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The times (i + 1) / 1000 with i from 1000 low to 1000 high, 999 at most, evenly, by their place u in [0, 1)."""
    first, last = round(1000 * low), min(round(1000 * high), 999)
    return (first + (u * (last - first + 1)).floor() + 1) / 1000


@dataclass(frozen=True)
class Sample:
    """What a rollout ends with: x_0 (B, D), the network's input and time there, and the exit, from 1, as (B,)."""

    x: Tensor
    given: Tensor
    t: Tensor
    exit: Tensor


def rolled(turn: Turn, text: Tensor | None = None) -> Sample:
    """The student's own sample, by this turn's draws: x_0, noised anew to the next of even times, up to the exit."""
    student, schedule, steps = turn.roles["student"], turn.problem.schedule, turn.path.steps
    text = turn.text if text is None else text
    x, t, exit = turn.noise("start"), torch.ones(len(text), dtype=torch.float64), int(turn.step.shared("exit") * steps)
    for i in range(exit):
        x0, told = student.x0(x, t, text), 10 * (1000 * t[0] - 1)
        if turn.problem.name == "vp":                            # LCMScheduler's boundary, of 1e-6 at these times
            x0 = told / (told**2 + 0.25).sqrt() * x0 + 0.25 / (told**2 + 0.25) * x
        t = t - 1 / steps
        x = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * turn.noise(f"renoise {i}")
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
