"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, with t in [0, 1] from data to noise.

Times are float64 tensors of shape (B,); every method takes and returns that shape. Coefficients are computed in
float64 on the CPU (some accelerators have no float64) and reach the state's device and dtype in `like`.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import pi
from typing import Sequence

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`. On its way to a GPU the host does not wait: the driver has copied it when the call
    returns.

    The way back waits, as it must: a CPU tensor would be read before it is written.
    """
    up = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return tensor.to(device, non_blocking=up)


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Gives a coefficient of shape (B,) the trailing axes, dtype and device of x, (B, ...)."""
    return moved(coefficient.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype), x.device)


def where(chosen: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x (B, ...) for the samples that are chosen, (B,) bool, y for the others."""
    return torch.where(like(chosen, x).bool(), x, y)


class Schedule(ABC):
    """Four scalar functions of time, and the way back from a noise level to its time."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...
    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...
    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor: ...
    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor: ...
    @abstractmethod
    def time_at(self, angle: Tensor) -> Tensor:
        """The t whose noise level atan2(sigma, alpha) is `angle`, in [0, pi / 2]: how schedules are matched by SNR."""

    @property
    def first(self) -> float:
        """The least time that its networks were taught: of continuous ones the data's, 0."""
        return 0.0

    def angle(self, t: Tensor) -> Tensor:
        """Noise level as an angle: 0 is data, pi / 2 pure noise. Finite at both ends, unlike log SNR."""
        return torch.atan2(self.sigma(t), self.alpha(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2); +inf at t = 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x0, eps: (B, ...); t: (B,). Returns x_t, of the shape of x0."""
        return like(self.alpha(t), x0) * x0 + like(self.sigma(t), x0) * eps

    def renoise(self, x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """x_t, t >= s, of what stands at s already: the noise that it lacks is fresh. alpha(s) > 0; `add_noise` is s =
        0."""
        kept = self.alpha(t) / self.alpha(s)
        fresh = (self.sigma(t) ** 2 - (kept * self.sigma(s)) ** 2).clamp(min=0).sqrt()
        return like(kept, x_s) * x_s + like(fresh, x_s) * eps

    def start(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """As `add_noise`, but unit noise alone at t = 1, where samplers begin and Stable Diffusion's alpha is still
        0.07: Lin et al. 2024, arXiv:2402.13929, eq. 24. For schedules whose sigma ends at 1."""
        return where(t >= 1, eps.to(x0), self.add_noise(x0, eps, t))


@dataclass(frozen=True)
class VariancePreserving(Schedule):
    """Ho et al. 2020, arXiv:2006.11239, on N discrete nodes as diffusers stores them.

    Node i, whose timestep is i, lies at t = (i + 1) / N and has exactly alpha^2 = alphas_cumprod[i]; t = 0 is clean
    data. Between nodes the angle atan2(sigma, alpha) is interpolated linearly.
    """

    alphas_cumprod: tuple[float, ...]

    @classmethod
    def of(cls, alphas_cumprod: Tensor | Sequence[float]) -> VariancePreserving:
        return cls(tuple(torch.as_tensor(alphas_cumprod, dtype=torch.float64).tolist()))

    @property
    def nodes(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def first(self):
        return 1 / self.nodes

    @cached_property
    def _angles(self) -> Tensor:
        squares = torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)
        return torch.atan2((1 - squares).sqrt(), squares.sqrt())

    @cached_property
    def _slopes(self) -> Tensor:
        return self._angles.diff() * self.nodes

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The segment between nodes that holds t (a node belongs to the one below it), and t's place in it."""
        position = t.double().cpu() * self.nodes
        nearest = position.round()
        position = torch.where((position - nearest).abs() < 1e-6, nearest, position)
        segment = (position.ceil().long() - 1).clamp(0, self.nodes - 1)
        return segment, position - segment

    def angle(self, t):
        segment, place = self._segment(t)
        low, high = self._angles[segment], self._angles[segment + 1]
        return torch.where(place == 1, high, low + place * (high - low))

    def alpha(self, t): return self.angle(t).cos()
    def sigma(self, t): return self.angle(t).sin()
    def d_alpha(self, t): return -self.angle(t).sin() * self._slopes[self._segment(t)[0]]
    def d_sigma(self, t): return self.angle(t).cos() * self._slopes[self._segment(t)[0]]

    def time_at(self, angle):
        angle = angle.double().cpu()
        segment = (torch.searchsorted(self._angles, angle) - 1).clamp(0, self.nodes - 1)
        low, high = self._angles[segment], self._angles[segment + 1]
        return ((segment + (angle - low) / (high - low)) / self.nodes).clamp(0, 1)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """Liu et al. 2022, arXiv:2209.03003; shift moves time towards noise (Esser et al. 2024, arXiv:2403.03206, eq.
    23)."""

    shift: float = 1.0

    def sigma(self, t):
        t = t.double().cpu()
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t): return 1 - self.sigma(t)
    def d_sigma(self, t): return self.shift / (1 + (self.shift - 1) * t.double().cpu()) ** 2
    def d_alpha(self, t): return -self.d_sigma(t)

    def time_at(self, angle):
        sigma = angle.double().cpu().sin() / (angle.double().cpu().sin() + angle.double().cpu().cos())
        return sigma / (self.shift - (self.shift - 1) * sigma)


@dataclass(frozen=True)
class TrigFlow(Schedule):
    """Lu & Song 2024, arXiv:2410.11081, with time rescaled to [0, 1]: alpha = cos(end t), sigma = sin(end t).

    end: the angle at t = 1, short of pi / 2 where a network knows no more noise. Of EDM's, whose x_0 + sigma eps is x_t
    / alpha here, it is atan(sigma_max).
    """

    end: float = pi / 2

    def angle(self, t): return t.double().cpu() * self.end
    def alpha(self, t): return self.angle(t).cos()
    def sigma(self, t): return self.angle(t).sin()
    def d_alpha(self, t): return -self.sigma(t) * self.end
    def d_sigma(self, t): return self.alpha(t) * self.end
    def time_at(self, angle): return (angle.double().cpu() / self.end).clamp(max=1)


@dataclass(frozen=True)
class VarianceExploding(Schedule):
    """Karras et al. 2022, arXiv:2206.00364: alpha = 1, sigma = sigma_max t."""

    sigma_max: float = 80.0

    def alpha(self, t): return torch.ones_like(t, dtype=torch.float64, device="cpu")
    def sigma(self, t): return self.sigma_max * t.double().cpu()
    def d_alpha(self, t): return torch.zeros_like(t, dtype=torch.float64, device="cpu")
    def d_sigma(self, t): return torch.full_like(t, self.sigma_max, dtype=torch.float64, device="cpu")
    def time_at(self, angle): return angle.double().cpu().tan() / self.sigma_max
