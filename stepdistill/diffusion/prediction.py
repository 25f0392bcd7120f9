"""What a network outputs, and every view of it.

A parameterisation is a row (a, b): the network predicts a x_0 + b eps. Together with x_t = alpha x_0 + sigma eps this
is a 2 x 2 linear system, so one solve gives x_0 and eps, and from them every other view. No pairwise converters.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Callable

import torch
from torch import Tensor

from .schedule import Schedule, like

Row = Callable[[Schedule, Tensor], tuple[Tensor, Tensor]]
# Raw outputs with and without a condition, w (B, 1, ...) -> their mix.
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


def edm(sigma_data: float) -> Row:
    """Karras et al. 2022, arXiv:2206.00364, table 1: raw = (x_0 - c_skip x) / c_out of x = x_t / alpha, whose noise is
    sigma / alpha."""
    def row(s: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = s.alpha(t), s.sigma(t)
        total = torch.hypot(sigma, alpha * sigma_data)
        return sigma / (sigma_data * total), -alpha * sigma_data / total
    return row


def _x0(s: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(s.alpha(t)), torch.zeros_like(s.alpha(t))


def _eps(s: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(s.alpha(t)), torch.ones_like(s.alpha(t))


PARAMETERISATIONS: dict[str, Row] = {
    "x0": _x0,
    "eps": _eps,
    "v": lambda s, t: (-s.sigma(t), s.alpha(t)),               # Salimans & Ho 2022, arXiv:2202.00512
    "velocity": lambda s, t: (s.d_alpha(t), s.d_sigma(t)),
    "edm": edm(sigma_data=0.5),
}


def truth(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule, kind: str) -> Tensor:
    """What a network of this kind is trained to output where it is x_0 and eps that made x_t: (B, ...)."""
    a, b = PARAMETERISATIONS[kind](schedule, t)
    return like(a, x0) * x0 + like(b, x0) * eps


def linear(given: Tensor, without: Tensor, w: Tensor) -> Tensor:
    """Classifier-free guidance of raw outputs: Ho & Salimans 2022, arXiv:2207.12598."""
    return without + w * (given - without)


def rescaled(combine: Combine, share: float) -> Combine:
    """Guidance whose result is drawn towards the spread of the conditional output, by a share in [0, 1]: Lin et al.
    2023, arXiv:2305.08891, section 3.4."""
    def rescale(given: Tensor, without: Tensor, w: Tensor) -> Tensor:
        mixed = combine(given, without, w)
        axes = tuple(range(1, mixed.ndim))
        return mixed * (share * given.std(axes, keepdim=True) / mixed.std(axes, keepdim=True) + 1 - share)
    return rescale


@dataclass(frozen=True)
class Prediction:
    """A network's output at x_t. raw, x_t: (B, ...); t: (B,) float64; kind: a key of PARAMETERISATIONS.

    combine: how its pipeline mixes the raw outputs with and without a condition, combine(given, without, w), w (B, 1,
    ...).

    A row is singular where it cannot tell x_0 from eps (x0 at sigma = 0, eps at alpha = 0): there the raw output is
    still the view of its own kind, and the others are not finite.
    """

    raw: Tensor
    x_t: Tensor
    t: Tensor
    schedule: Schedule
    kind: str
    combine: Combine = linear

    @cached_property
    def _solved(self) -> tuple[Tensor, Tensor]:
        a, b = PARAMETERISATIONS[self.kind](self.schedule, self.t)
        alpha, sigma = self.schedule.alpha(self.t), self.schedule.sigma(self.t)
        det = alpha * b - sigma * a
        p, q, r, u = (like(c / det, self.x_t) for c in (b, -sigma, -a, alpha))
        return p * self.x_t + q * self.raw, r * self.x_t + u * self.raw

    def view(self, kind: str) -> Tensor:
        """This prediction as another parameterisation would put it."""
        if kind == self.kind:
            return self.raw
        return truth(*self._solved, self.t, self.schedule, kind)

    @cached_property
    def x0(self) -> Tensor:
        return self.raw if self.kind == "x0" else self._solved[0]

    @cached_property
    def eps(self) -> Tensor:
        return self.raw if self.kind == "eps" else self._solved[1]

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x_0."""
        return self.view("v")

    @property
    def velocity(self) -> Tensor:
        """dx_t / dt along the probability-flow ODE: alpha' x_0 + sigma' eps."""
        return self.view("velocity")

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) = -eps / sigma."""
        return -self.eps / like(self.schedule.sigma(self.t), self.x_t)
