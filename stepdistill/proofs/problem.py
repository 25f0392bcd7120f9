"""A problem with a known answer, drawn from a seed: Gaussian data, of a mean that the condition names, under any noise.

Every law is closed: the teacher's, the guided teacher's (all conditions share one covariance, so mixing denoisers mixes
means), the flow map's, and the score of what an affine student draws. Figures are float64 unless a method draws noise,
which is float32.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from ..diffusion.contracts import Batch, Condition, Pairs
from ..diffusion.draws import Step, key
from ..diffusion.exact import Gaussian
from ..diffusion.prediction import Prediction, truth
from ..diffusion.sampler import Sampler
from ..diffusion.schedule import RectifiedFlow, Schedule, VariancePreserving, like
from ..methods.base import Inference
from ..models.schedulers import sampler_of, stock_call

KINDS = {"vp": ("v", "eps"), "flow": ("velocity",)}      # what a network may predict
NAMES = tuple(KINDS)
VP = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
# Noises beyond Stable Diffusion's own betas: name -> the scheduler's config, and a kind of network that is sound there.
BEYOND: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "vp": {"zero terminal SNR": ({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                                  "rescale_betas_zero_snr": True}, "v"),
           "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, "v"),
           "linear": ({"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}, "eps")},
    "flow": {"flow with shift 3": ({"shift": 3.0}, "velocity")},
}


@dataclass(frozen=True)
class Check:
    """One thing that was measured. It passes where figure <= tolerance, both in the unit that the name speaks of."""

    name: str
    figure: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return bool(self.figure <= self.tolerance)             # not where it is not a number


def difference(found: Tensor, known: Tensor) -> float:
    """The largest difference, relative to the largest of what is known."""
    return ((found - known).abs().max() / known.abs().max()).item()


def largest(*figures: float) -> float:
    """The largest; not a number where one of them is none, which Python's max would pass over."""
    return torch.tensor(figures, dtype=torch.float64).max().item()


def gradient(loss: Tensor, student: Affine) -> Tensor:
    """Of a scalar in all numbers of the student, flat."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (student.m, student.S))])


def reaching(loss: Tensor, role: Affine) -> float:
    """The norm of the gradient of a scalar in the numbers of a role that takes none, 0 where it has no part in it."""
    found = torch.autograd.grad(loss, (role.m, role.S), allow_unused=True)
    return sum(0.0 if g is None else g.norm().item() for g in found)


def standard_errors(slope: Tensor, x_t: Tensor) -> float:
    """The largest mean of slope_i and of slope_i x_t,j over samples, in standard errors: of order 1 where all are 0.

    slope, x_t (B, D). They are the gradients of a regression in the constants and the coefficients of an affine
    prediction.
    """
    return off_zero(torch.cat([slope, (slope[:, :, None] * x_t[:, None, :]).flatten(1)], 1))


def off_zero(terms: Tensor) -> float:
    """The largest mean over samples of terms (B, K), in standard errors: of order 1 where all are 0 on average."""
    return (terms.mean(0).abs() / (terms.std(0) / len(terms) ** 0.5)).max().item()


def off_law(drawn: Tensor, values: Tensor, shares: Tensor | None = None) -> float:
    """How far the mean of draws (N,), and that of their squares, are from those of a law, in its standard errors.

    values (M,), each with probability shares (M,), which sum to 1; None: all alike.
    """
    powers = torch.stack([values, values**2])
    shares = torch.full_like(values, 1 / len(values)) if shares is None else shares
    mean = powers @ shares
    errors = (((powers - mean[:, None]) ** 2) @ shares / len(drawn)).sqrt()
    return ((torch.stack([drawn, drawn**2]).mean(1) - mean).abs() / errors).max().item()


def evenly(low: float, high: float, count: int = 10_000) -> Tensor:
    """The middles (count,) float64 of as many equal parts of an interval: a uniform law, for `off_law`."""
    return low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count


def normal_values(mean: float, std: float) -> Tensor:
    """A normal law, for `off_law`."""
    return mean + std * torch.special.ndtri(evenly(0, 1))


def stock_times(low: float = 0.0, high: float = 1.0) -> Tensor:
    """(i + 1) / 1000, i from 1000 low to 1000 high, 999 at most."""
    return torch.arange(round(1000 * low) + 1, min(round(1000 * high) + 1, 1000) + 1, dtype=torch.float64) / 1000


def condition_error(conditions: list[Condition], cond: Condition) -> float:
    """The largest distance of these conditions from `cond`. Of a guided call the last half is its prompts."""
    return largest(*((each.text[-len(cond):] - cond.text).abs().max().item() for each in conditions))


def moments(x: Tensor) -> Tensor:
    """(B, D) -> its numbers and their products, (B, D + D^2): what tells one Gaussian from another."""
    return torch.cat([x, (x[:, :, None] * x[:, None, :]).flatten(1)], 1)


@dataclass(frozen=True)
class Law:
    """The exact denoiser of x_0 ~ N(mean, covariance), as a role. covariance (D, D); mean (D,), or None: cond.text (B,
    D)."""

    schedule: Schedule
    covariance: Tensor
    kind: str
    mean: Tensor | None = None

    def of(self, cond: Condition) -> Gaussian:
        """The laws of a batch, each sample's under its own condition."""
        return Gaussian(self.schedule, cond.text if self.mean is None else self.mean, self.covariance, self.kind)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self.of(cond)(x_t, t)


@dataclass
class FunctionRole:
    """A role that predicts x_0 = x0_of(x_t, t, cond), whatever it is; where sigma = 0, x_t itself unless its kind is
    x0.

    calls: the arguments of each call.
    """

    schedule: Schedule
    x0_of: Callable[[Tensor, Tensor, Condition], Tensor]
    kind: str = "x0"
    calls: list[tuple[Tensor, Tensor, Condition]] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        self.calls.append((x_t.detach(), t, cond))
        x0 = self.x0_of(x_t, t, cond)
        eps = (x_t - like(self.schedule.alpha(t), x_t) * x0) / like(self.schedule.sigma(t).clamp(min=1e-12), x_t)
        raw = x0 if self.kind == "x0" else truth(x0, eps, t, self.schedule, self.kind)
        return Prediction(raw, x_t, t, self.schedule, self.kind)


@dataclass
class Affine:
    """A student whose x_0 is m + S x_t at every time: of unit noise it draws N(m, S S'). m (D,), S (D, D) take
    gradients."""

    schedule: Schedule
    m: Tensor
    S: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return Prediction(self.m.to(x_t) + x_t @ self.S.to(x_t).T, x_t, t, self.schedule, "x0")

    def as_network(self, kind: str) -> FunctionRole:
        """The same beliefs, put as a network of this kind puts them."""
        return FunctionRole(self.schedule, lambda x, t, cond: self.m + x @ self.S.T, kind)

    @property
    def law(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of its one-step samples."""
        return self.m.detach(), (self.S @ self.S.T).detach()


class Problem:
    """name: of the noise, "vp" (betas drawn about Stable Diffusion's) or "flow". Everything else is drawn from the
    seed.

    schedule, kind: the teacher's; dim: D; w: a guidance scale above 1; covariance (D, D); teacher: a `Law`; means (2,
    D): the conditional and the unconditional mean. Times of checks are to stay off t = 0 where a row is singular.
    """

    def __init__(self, seed: int, name: str) -> None:
        self.seed, self.name = seed, name
        self.generator = torch.Generator().manual_seed(key(seed, "problem", name))
        self.dim = 2 + int(self.uniform() * 3)
        self.w = 1.5 + 3 * self.uniform()
        self.kind = KINDS[name][int(self.uniform() * len(KINDS[name]))]
        self.scheduler = self._scheduler()
        self.schedule: Schedule = (RectifiedFlow() if name == "flow"
                                   else VariancePreserving.of(self.scheduler.alphas_cumprod.double()))
        self.covariance = self.drawn_covariance()
        self.means = self.normal(2, self.dim)
        self.teacher = Law(self.schedule, self.covariance, self.kind)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def normal(self, *shape: int) -> Tensor:
        """Float64, of the problem's own row of numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def drawn_covariance(self) -> Tensor:
        """(D, D), standard deviations from 0.3 to 0.9 along axes of its own."""
        axes, _ = torch.linalg.qr(self.normal(self.dim, self.dim))
        deviations = 0.3 + 0.6 * torch.rand(self.dim, generator=self.generator, dtype=torch.float64)
        return axes @ torch.diag(deviations**2) @ axes.T

    @property
    def axes(self) -> tuple[Tensor, Tensor]:
        """The principal variances (D,) of the covariance, and their axes in columns (D, D)."""
        return tuple(torch.linalg.eigh(self.covariance))

    def affine(self) -> Affine:
        """A student with an m and an S of its own."""
        deviation = torch.linalg.cholesky(self.drawn_covariance())
        return Affine(self.schedule, self.normal(self.dim).requires_grad_(), deviation.requires_grad_())

    def law(self, covariance: Tensor, mean: Tensor | None = None) -> Law:
        return Law(self.schedule, covariance, self.kind, mean)

    def times(self, count: int, low: float = 0.02, high: float = 1.0) -> Tensor:
        """(count,) float64, descending."""
        return torch.rand(count, generator=self.generator,
                          dtype=torch.float64).mul(high - low).add(low).sort(descending=True).values

    def cond(self, count: int) -> Condition:
        conditional, null = (mean.expand(count, -1) for mean in self.means)
        return Condition(text=conditional, null=Condition(text=null))

    def prompts(self, count: int) -> Condition:
        """One of its own for every sample, whatever laws they name."""
        return Condition(text=self.normal(count, self.dim), null=Condition(text=self.normal(count, self.dim)))

    def guided_cond(self, count: int, w: float | Tensor) -> Condition:
        """The condition under which the teacher's law is the guided one at w: its mean is null + w (conditional -
        null)."""
        conditional, null = self.means
        return Condition(text=null + torch.as_tensor(w, dtype=torch.float64).expand(count)[:, None]
                         * (conditional - null))

    def batch(self, count: int, data: bool = True, offset: int = 0) -> Batch:
        """Prompts, and samples of the conditional law unless data is False."""
        cond, ids = self.cond(count), torch.arange(offset, offset + count)
        x0 = self.teacher.of(cond).mean + self.normal(count, self.dim) @ torch.linalg.cholesky(self.covariance).T
        return Batch(ids, cond, x0 if data else None, (self.dim,))

    def flow(self, x_t: Tensor, t: Tensor, r: Tensor, w: float) -> Tensor:
        """Where the guided teacher's probability-flow ODE carries x_t (B, D) from t to r, (B,)."""
        return self.teacher.of(self.guided_cond(len(x_t), w)).flow(x_t, t, r)

    def paired(self, count: int, nodes: int = 1, w: float = 1.0) -> Batch:
        """Prompts, unit noises, and the guided teacher's exact ways from there: evenly spaced states, the last its
        sample."""
        noise, start = self.normal(count, self.dim), torch.ones(count, dtype=torch.float64)
        times = torch.linspace(1, 0, nodes + 1, dtype=torch.float64)[1:].expand(count, -1)
        states = torch.stack([self.flow(noise, start, r, w) for r in times.T], 1)
        return Batch(torch.arange(count), self.cond(count), states[:, -1], pairs=Pairs(noise, states, times))

    def step(self, count: int, update: str = "student", **moment: Any) -> Step:
        """The moment of the first `count` samples. moment: repeat, index, progress, kept of Step."""
        fields = {"index": 0, "progress": 0.0, "repeat": 0, **moment}
        return Step(self.seed, update=update, ids=torch.arange(count), **fields)

    def sampler(self, inference: Inference) -> Sampler:
        """The sampler that a method trains and exports with on this noise."""
        return sampler_of(stock_call(inference, self.schedule), self.schedule, self.scheduler)

    def _scheduler(self) -> SchedulerMixin:
        if self.name == "flow":
            return FlowMatchEulerDiscreteScheduler()
        return DDIMScheduler(beta_start=self.uniform(0.0007, 0.001), beta_end=self.uniform(0.011, 0.014),
                             beta_schedule="scaled_linear", **VP)


class Elsewhere(Problem):
    """A problem under one of the noises of BEYOND. kind: what its networks predict, the table's unless given."""

    def __init__(self, seed: int, name: str, noise: str, kind: str | None = None) -> None:
        self.noise, (self.config, own) = noise, BEYOND[name][noise]
        super().__init__(seed, name)
        self.kind = kind or own
        self.teacher = Law(self.schedule, self.covariance, self.kind)

    def _scheduler(self) -> SchedulerMixin:
        if self.name == "flow":
            return FlowMatchEulerDiscreteScheduler(**self.config)
        return DDIMScheduler(**self.config, **VP)
