"""The known side of the rows on paths: coefficients from the stock scheduler's own table, and every step written out.

Nothing here calls the solvers, the samplers, the guidance or the parameterisations that the rows test. All is float64.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..diffusion.draws import key
from .problem import BEYOND, Elsewhere, Problem

LEVELS = 1000
Denoiser = Callable[[Tensor, Tensor], Tensor]                # (x_t, t) -> x_0


def sites(problem: Problem) -> list[Problem]:
    """The problem itself, and one under each noise beyond Stable Diffusion's."""
    return [problem, *(Elsewhere(key(problem.seed, noise), problem.name, noise) for noise in BEYOND[problem.name])]


def column(numbers: Tensor | float, x: Tensor) -> Tensor:
    """(B,) or one number -> (B, 1) float64."""
    return torch.as_tensor(numbers, dtype=torch.float64).expand(len(x))[:, None]


class Hand:
    """A problem's noise and teacher as one writes them down. Times t (B,) float64; states (B, D)."""

    def __init__(self, problem: Problem) -> None:
        self.flow, self.end = problem.name == "flow", 0.0 if problem.name == "flow" else 1 / LEVELS
        self.variances, self.axes = torch.linalg.eigh(problem.covariance)
        if not self.flow:
            squares = torch.cat([torch.ones(1).double(), problem.scheduler.alphas_cumprod.double()])
            self.angles = torch.atan2((1 - squares).sqrt(), squares.sqrt())

    def angle(self, t: Tensor) -> Tensor:
        """atan(sigma / alpha), (B,): between two times of the table it is linear in t."""
        if self.flow:
            return torch.atan2(t, 1 - t)
        place = t * LEVELS
        place = torch.where((place - place.round()).abs() < 1e-6, place.round(), place)
        below = place.floor().clamp(0, LEVELS - 1).long()
        return self.angles[below] + (place - below) * (self.angles[below + 1] - self.angles[below])

    def time(self, angle: Tensor) -> Tensor:
        """The inverse of `angle`."""
        if self.flow:
            return angle.sin() / (angle.sin() + angle.cos())
        below = (torch.searchsorted(self.angles, angle.contiguous()) - 1).clamp(0, LEVELS - 1)
        return (below + (angle - self.angles[below]) / (self.angles[below + 1] - self.angles[below])) / LEVELS

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), (B, 1)."""
        if self.flow:
            return (1 - t)[:, None], t[:, None]
        angle = self.angle(t)
        return angle.cos()[:, None], angle.sin()[:, None]

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        a, s = self.at(t)
        return a * x0 + s * eps.double()

    def clean(self, x: Tensor, a: Tensor, s: Tensor, mean: Tensor) -> Tensor:
        """E[x_0 | a x_0 + s eps = x] for x_0 ~ N(mean, covariance)."""
        along = (x - a * mean) @ self.axes
        return mean + (along * a * self.variances / (a**2 * self.variances + s**2)) @ self.axes.T

    def noise(self, x: Tensor, a: Tensor, s: Tensor, mean: Tensor) -> Tensor:
        """E[eps | x]."""
        return ((x - a * mean) @ self.axes * s / (a**2 * self.variances + s**2)) @ self.axes.T

    def teacher(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        """The teacher's x_0 where its data have this mean."""
        return self.clean(x, *self.at(t), mean)

    def ddim(self, x: Tensor, t: Tensor, r: Tensor, mean: Tensor) -> Tensor:
        """The teacher's step from t to r: alpha_r x_0 + sigma_r eps."""
        (a, s), (a_r, s_r) = self.at(t), self.at(r)
        return a_r * self.clean(x, a, s, mean) + s_r * self.noise(x, a, s, mean)

    def heun(self, x: Tensor, t: Tensor, r: Tensor, mean: Tensor) -> Tensor:
        """The trapezoidal rule in x / alpha over sigma / alpha, of a flow in x over t."""
        (a, s), (a_r, s_r) = self.at(t), self.at(r)
        x_r = self.ddim(x, t, r, mean)
        here, there = self.noise(x, a, s, mean), self.noise(x_r, a_r, s_r, mean)
        if self.flow:
            slope = here + there - self.clean(x, a, s, mean) - self.clean(x_r, a_r, s_r, mean)
            return x + (s_r - s) / 2 * slope
        return a_r / a * x + a_r * (s_r / a_r - s / a) / 2 * (here + there)

    def land(self, x0: Tensor, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """sigma_r / sigma_t x + (alpha_r - alpha_t sigma_r / sigma_t) x_0; x itself at t = 0."""
        (a, s), (a_r, s_r) = self.at(t), self.at(r)
        q = torch.where(s > 0, s_r / s.clamp(min=1e-30), 1.0)
        return q * x + (a_r - q * a) * x0

    def secant(self, x: Tensor, x_r: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The x_0 with which `land` comes to x_r."""
        (a, s), (a_r, s_r) = self.at(t), self.at(r)
        return (x_r - s_r / s * x) / (a_r - s_r / s * a)

    def boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) of LCMScheduler, (B, 1). A flow has none: x_0 of a velocity is the state at t = 0."""
        if self.flow:
            out = (t[:, None] > 0).double()
            return 1 - out, out
        scaled = 10 * (LEVELS * t[:, None] - 1)
        return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        a, s = self.at(t)
        return (a / s) ** 2

    # -- samplers ----------------------------------------------------------------------------------------------------

    def deterministic(self, x0: Denoiser, noise: Tensor, times: Sequence[float]) -> Tensor:
        """By DDIM along `times`, which descend and end where the sample is."""
        x = noise
        for t, r in zip(times, times[1:]):
            t, r = column(t, x)[:, 0], column(r, x)[:, 0]
            x = self.land(x0(x, t), x, t, r)
        return x

    def multistep(self, x0: Denoiser, noise: Tensor, times: Sequence[float], draw: Callable[[int], Tensor]) -> Tensor:
        """A consistency model's: to x_0, and back to the next time with fresh noise."""
        x = noise
        for i, t in enumerate(times):
            t = column(t, x)[:, 0]
            skip, out = self.boundary(t)
            x = skip * x + out * x0(x, t)
            if i + 1 < len(times):
                x = self.noised(x, draw(i), column(times[i + 1], x)[:, 0])
        return x

    def strategic(self, x0: Denoiser, noise: Tensor, times: Sequence[float], gamma: float,
                  draw: Callable[[int], Tensor]) -> Tensor:
        """TCD's algorithm 4 by the told times of TCDScheduler: to floor((1 - gamma) n), n the next, and back to n."""
        x, timesteps = noise, [round(LEVELS * t) - 1 for t in times] + [0]
        for i, (now, after) in enumerate(zip(timesteps, timesteps[1:])):
            past = int((1 - gamma) * after)
            t, s, r = (column((n + 1) / LEVELS, x)[:, 0] for n in (now, past, after))
            x = self.land(x0(x, t), x, t, s)
            if gamma > 0 and i + 2 < len(timesteps):
                kept = self.at(r)[0] / self.at(s)[0]
                x = kept * x + (self.at(r)[1] ** 2 - (kept * self.at(s)[1]) ** 2).sqrt() * draw(i)
        return x


@dataclass
class Learner:
    """x_0 = m + S x_t + T text + n t, and + u (w - 1), + k r where it reads a guidance scale, or where to land; all
    take gradients."""

    problem: Problem
    reads: tuple[str, ...] = ()
    parts: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        d = self.problem.dim
        shapes = [(d,), (d, d), (d, d), (d,), (d,), *[(d,)] * ("r" in self.reads)]
        self.parts = [(0.5 * self.problem.normal(*shape)).requires_grad_() for shape in shapes]

    @property
    def reads_w(self) -> bool:
        return "w" in self.reads

    def x0(self, x: Tensor, t: Tensor, cond: Condition, w: Tensor | float | None = None) -> Tensor:
        """Where it is to land, it finds in cond.r."""
        m, S, T, n, u, *k = self.parts
        x0 = m + x @ S.T + cond.text @ T.T + t[:, None] * n
        x0 = x0 + cond.r.to(x)[:, None] * k[0] if k else x0
        return x0 + (column(w, x) - 1) * u if self.reads_w else x0

    def network(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """As a `FunctionRole` answers. ValueError where it is told a scale that it does not read, or none."""
        if (cond.w is not None) != self.reads_w:
            raise ValueError(f"this network reads {'a' if self.reads_w else 'no'} guidance scale; it was told {cond.w}")
        return self.x0(x, t, cond, None if cond.w is None else cond.w.double())

    def gradient(self, loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, self.parts, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(self.parts, found)])


def guided_mean(cond: Condition, w: Tensor | float) -> Tensor:
    """Of the law that guidance at w makes of two of one covariance: null + w (text - null), the negative in place of
    the null where there is one. (B, D)."""
    away = cond.null.text if cond.negative is None else cond.negative.text
    return away + column(w, cond.text) * (cond.text - away)


def distance(name: str, huber_c: float | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over samples and elements of d^2, |d| or (d^2 + c^2)^(1/2) - c."""
    return {"squared": lambda x, y: (x - y).square().mean(), "absolute": lambda x, y: (x - y).abs().mean(),
            "huber": lambda x, y: (torch.hypot(x - y, torch.full_like(x, huber_c)) - huber_c).mean()}[name]
