"""sCM's loss by hand, of networks of few numbers, for the paths of methods that hold it among their losses.

Written out under TrigFlow in angles theta = atan(sigma / alpha), without the code's views, differences and laws.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import Net
from .hand import LEVELS, Hand
from .paths import Path, Turn
from .problem import Problem

FEW = tuple(Path(name, settings, steps=steps, moments=moments) for name, settings, steps, moments in (
    ("mean and deviation", {"mean": 0.3, "std": 1.1}, 1, (20,)),
    ("exact derivatives", {"derivative": "exact"}, 2, (20,)),
    ("one difference", {"derivative": "difference"}, 1, (20,)),
    ("width", {"width": 0.01}, 1, (20,)),
    ("no warm-up", {"warmup": 0.0}, 1, (0,)),
    ("a long warm-up", {"warmup": 0.8}, 1, (20, 90)),
    ("damping 1", {"damping": 1.0}, 1, (20,))))
"""A path for each setting of the tangent, of one moment in the warm-up or after it."""


def latest(problem: Problem) -> float:
    """The time where sampling starts: of a flow 0.999, of a table its last entry with sigma / alpha up to 80."""
    if problem.name == "flow":
        return 0.999
    known = torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS
    return known[Hand(problem).angle(known).tan() <= 80].max().item()


def sampled(problem: Problem, steps: int) -> Sequence[float]:
    """When samplers ask: even times, of a flow moved by 2 towards noise, the first as far as there was training. Stock
    schedulers of a flow keep float32 numbers."""
    even = [1 - i / steps for i in range(steps)]
    if problem.name == "flow":
        return torch.tensor([min(2 * t / (1 + t), latest(problem)) for t in even], dtype=torch.float32).tolist()
    if latest(problem) == 1:                                   # LCMScheduler's own times, floor(1000 / steps) apart
        return [1 - i * (LEVELS // steps) / LEVELS for i in range(steps)]
    return [min(t, latest(problem)) for t in even]


def angles(turn: Turn, u: Tensor) -> Tensor:
    """ln tan theta normal, cut off a tenth of a time inside what the networks know and where sampling starts."""
    hand, s = Hand(turn.problem), turn.settings
    last = latest(turn.problem) - 0.1 / LEVELS * (turn.problem.name == "vp")
    ends = torch.tensor([1.1 / LEVELS, last], dtype=torch.float64)
    return (s.mean + s.std * torch.special.ndtri(u)).exp().atan().clamp(*hand.angle(ends).tolist())


@dataclass(frozen=True)
class Seen:
    """What a network is given at an angle: its own state (B, D) and time (B,), and TrigFlow's cos and sin, (B, 1)."""

    x: Tensor
    t: Tensor
    cos: Tensor
    sin: Tensor


def seen(problem: Problem, x: Tensor, theta: Tensor) -> Seen:
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    return Seen(x / (cos + sin) if problem.name == "flow" else x, Hand(problem).time(theta), cos, sin)


def clean(problem: Problem, net: Net, x: Tensor, theta: Tensor, text: Tensor, w: Tensor | None = None) -> Tensor:
    """x_0 of a network in a state of TrigFlow, no gradient."""
    own = seen(problem, x, theta)
    return net.x0(own.x, own.t, text, w)


def noised(turn: Turn, x: Tensor, theta: Tensor, name: str = "noise") -> Tensor:
    return theta.cos()[:, None] * x + theta.sin()[:, None] * turn.noise(name)


def field(problem: Problem, net: Net, x: Tensor, theta: Tensor, text: Tensor, w: Tensor | None) -> Tensor:
    """F = v = (cos x - x_0) / sin. With its slopes in x and theta."""
    own = seen(problem, x, theta)
    return (own.cos * x - net._affine(own.x, own.t, text, w)) / own.sin


def along(turn: Turn, x: Tensor, theta: Tensor, velocity: Tensor, w: Tensor | None) -> Tensor:
    """dF / dtheta where dx / dtheta = velocity; or (cos b F(x) - F(cos b x - sin b velocity, theta - b)) / sin b, b the
    width, no further than the first time; or twice that of half the width, less that of the whole."""
    s, problem, student = turn.settings, turn.problem, turn.roles["student"]
    f = lambda x, theta: field(problem, student, x, theta, turn.text, w)
    if s.derivative == "exact":
        return torch.func.jvp(f, (x, theta), (velocity, torch.ones_like(theta)))[1].detach()
    first = Hand(problem).angle(torch.tensor([1 / LEVELS], dtype=torch.float64))

    @torch.no_grad()
    def secant(share: float) -> Tensor:
        b = share * (theta - first).clamp(max=s.width)
        cos, sin = b.cos()[:, None], b.sin()[:, None]
        return (cos * f(x, theta) - f(cos * x - sin * velocity, torch.maximum(theta - b, first))) / sin
    return secant(1.0) if s.derivative == "difference" else 2 * secant(0.5) - secant(1.0)


def consistency(turn: Turn, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss of this turn's data at the angles of its draw "t", and its flat gradient in the student, which reads w.

    g = cos^2 (v - F) - r cos sin (x + dF / dtheta); the slope of the loss in F is -2 g / (rms + c) over the numbers.
    """
    s, problem, student = turn.settings, turn.problem, turn.roles["student"]
    theta = angles(turn, turn.step.uniform("t"))
    x = noised(turn, turn.x0, theta)
    own = seen(problem, x, theta)
    velocity = (own.cos * x - clean(problem, turn.roles["teacher"], x, theta, turn.guided(turn.scale))) / own.sin
    output = field(problem, student, x, theta, turn.text, w).detach()
    r = min(1.0, turn.step.progress / s.warmup) if s.warmup else 1.0
    g = own.cos**2 * (velocity - output) - r * own.cos * own.sin * (x + along(turn, x, theta, velocity, w))
    aim = g / (g.square().mean(1, keepdim=True).sqrt() + s.damping)
    pull = 2 * aim / own.sin / aim.numel()                       # in x_0, of which F has -1 / sin
    return aim.square().mean(), student.slopes(pull, own.x, own.t, turn.text, w)
