"""Paths of scm: the tangent along the guided teacher's ODE written out, and where sampling starts."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.draws import Step
from ..losses.tangent import RADIAN
from ..methods.consistency.scm import Settings
from . import tangents
from .hand import sites
from .path_rows import DRAWN, Cast, cast, sampled, table, trained
from .path_table import Path, all_paths
from .paths_consistency import Draw
from .problem import Check, Problem, largest, normal_values, off_law

MANY = 5_000
SHARES = (0.25, 2.0)                       # of the warm-up: in it and after
FIRST, INSIDE = 1e-3, 1e-4                 # of the times that are known the first; how far from it they are drawn


def field(found: Cast, x: Tensor, theta: Tensor) -> Tensor:
    """F = v of the student under TrigFlow, (cos x - x_0) / sin, of the state that its own noise makes of x."""
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    own = x / (cos + sin) if found.hand.flow else x
    return (cos * x - found.student(own, found.hand.time(theta))) / sin


def velocity(found: Cast, x: Tensor, theta: Tensor) -> Tensor:
    """v of the guided teacher: (cos x - x_0) / sin."""
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    return (cos * x - found.hand.clean(x, cos, sin, found.mean)) / sin


def whole(found: Cast, x: Tensor, theta: Tensor) -> Tensor:
    """dF / dtheta along the ODE, dx / dtheta = v."""
    given = (velocity(found, x, theta), torch.ones_like(theta))
    return torch.func.jvp(lambda x, theta: field(found, x, theta), (x, theta), given)[1]


def secant(found: Cast, x: Tensor, theta: Tensor, share: float = 1.0) -> Tensor:
    """(cos b F(x) - F(cos b x - sin b v, theta - b)) / sin b, b a share of the width, no further than the first
    time."""
    first = found.hand.angle(torch.tensor([FIRST], dtype=torch.float64))
    b = share * (theta - first).clamp(max=found.settings.width)
    cos, sin = b.cos()[:, None], b.sin()[:, None]
    before = field(found, cos * x - sin * velocity(found, x, theta), torch.maximum(theta - b, first))
    return (cos * field(found, x, theta) - before) / sin


def pair(found: Cast, x: Tensor, theta: Tensor) -> Tensor:
    """The error of first order of a whole and a half width cancels."""
    return 2 * secant(found, x, theta, 0.5) - secant(found, x, theta)


def scm_loss(found: Cast) -> Tensor:
    """A loss whose gradient is -2 aim dF, aim = g / (rms + c), g = cos^2 (v - F) - r cos sin (x + dF/dtheta)."""
    theta = found.method.consistency.times(found.step.uniform("t")) * torch.pi / 2
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    x = cos * found.batch.x0 + sin * found.eps()
    r = min(1.0, found.step.progress / found.settings.warmup) if found.settings.warmup else 1.0
    v, output = velocity(found, x, theta), field(found, x, theta)
    slope = {"exact": whole, "pair": pair, "difference": secant}[found.settings.derivative](found, x, theta)
    g = (cos**2 * (v - output) - r * cos * sin * (x + slope)).detach()
    aim = g / (g.square().mean(1, keepdim=True).sqrt() + found.settings.damping)
    return (-2 * aim * output).mean()


def scm_sample(found: Cast, noise: Tensor, draw: Draw) -> Tensor:
    """As a consistency model, from the last time that was trained; a flow's others are moved by 2 towards noise."""
    return found.hand.multistep(found.drawn, noise, tangents.sampled(found.problem, found.path.steps), draw)


@dataclass(frozen=True)
class Latest(Step):
    """Every uniform draw is as near to 1 as float64 has."""

    def uniform(self, name: str) -> Tensor:
        return torch.full((len(self.ids),), 1 - 2.0**-53, dtype=torch.float64)


def latest(path: Path, problem: Problem) -> float:
    """How far the time where sampling starts is from where it should, and from the last at which the student was
    trained."""
    found = cast("scm", path, problem, progress=1.0)
    step = Latest(**{**vars(found.step), "ids": found.batch.ids})
    found.method.loss(found.batch, step)
    student = found.method.roles["student"]
    asked = student.calls if path.kept is None else student.role.calls           # that keeps its guidance: within
    trained_at = max(t.max().item() for _, t, _ in asked)
    first = found.method.sampler.times[0].item()
    return largest(abs(trained_at - first), abs(tangents.latest(problem) - first))


def scm(problem: Problem) -> Iterator[Check]:
    """As `path_rows.rows`, in the warm-up and after it, and where sampling starts."""
    yield from table("scm", problem)
    places = sites(problem)
    for path in all_paths("scm"):
        moments = [share * path.settings_of("scm").warmup for share in SHARES]
        yield Check(f"{path.name}: gradient against that of the tangent written out, on {len(places)} noises; relative",
                    largest(*(trained("scm", path, place, scm_loss, value=False, progress=moment)
                              for place in places for moment in moments)), 1e-6)
        yield Check(f"{path.name}: {DRAWN}, on {len(places)} noises; relative",
                    largest(*(sampled("scm", path, place, scm_sample) for place in places)), 1e-4)
        yield Check(f"{path.name}: time where sampling starts from the last that was trained, on {len(places)} noises",
                    largest(*(latest(path, place) for place in places)), 2e-4)
    path = Path("mean and deviation", {"mean": 0.9, "std": 1.1})
    found = cast("scm", path, problem)
    yield Check(f"{path.name}: moments of its times against those of their law, in standard errors",
                off_law(found.method.consistency.times(problem.step(MANY).uniform("t")),
                        published_times(problem, found.settings)), 6)


def last_trained(problem: Problem) -> float:
    """Where sampling starts, a tenth of a time inside a table's entry."""
    return tangents.latest(problem) - INSIDE * (problem.name == "vp")


def published_times(problem: Problem, settings: Settings) -> Tensor:
    """Of the law, cut off where a network knows no more times and where sampling starts."""
    ends = torch.tensor([FIRST + INSIDE, last_trained(problem)], dtype=torch.float64)
    return normal_values(settings.mean,
                         settings.std).exp().atan().clamp(*problem.schedule.angle(ends).tolist()) * RADIAN
