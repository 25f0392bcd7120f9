"""Paths of flow_map: its tangents along the guided teacher's ODE, and TraFlow's terms, written out on a flow."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .hand import Hand, column, sites
from .path_rows import DRAWN, Cast, cast, sampled, table, trained
from .path_table import Path, all_paths
from .paths_consistency import Draw, even_times
from .problem import Check, Problem, largest, off_law

MANY = 5_000
SHARES = (0.25, 2.0)                       # of the warm-up: in it and after
FIRST, INSIDE = 1e-3, 1e-4                 # of the times that are known the first; how far from it they are drawn
LEAST = 1e-4                               # of a difference


def own_time(hand: Hand, t: Tensor) -> Tensor:
    """The networks' time at a flow's t."""
    return t if hand.flow else hand.time(torch.atan2(t, 1 - t))


def flow_time(hand: Hand, own: Tensor) -> Tensor:
    """A flow's t at the networks' own time."""
    a, s = (each[:, 0] for each in hand.at(own))
    return s / (a + s)


def u(found: Cast, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """eps - x_0 = (x - x_0) / t of the student, of the state that its own noise makes of x, told its own time of r."""
    own = x if found.hand.flow else x / torch.hypot(1 - t, t)[:, None]
    cond = found.told.replace(r=own_time(found.hand, r))
    return (x - found.learner.x0(own, own_time(found.hand, t), cond)) / t[:, None]


def v(found: Cast, x: Tensor, t: Tensor) -> Tensor:
    """eps - x_0 of the guided teacher."""
    a, s = (1 - t)[:, None], t[:, None]
    return found.hand.noise(x, a, s, found.mean) - found.hand.clean(x, a, s, found.mean)


def times(found: Cast) -> tuple[Tensor, Tensor]:
    """1 / (1 + exp -N(mean, std^2)) twice, the later and the earlier, or twice the later; t is one that the network was
    taught, and so is r, or 0."""
    s, step = found.settings, found.step
    draws = torch.stack([torch.special.ndtri(step.uniform(name)) for name in ("t", "r")])
    t, r = (1 / (1 + (-s.mean - s.std * draws).exp())).sort(0, descending=True).values
    r = torch.where(step.uniform("alike") < s.alike, t, r)
    first, low, high = flow_time(found.hand, torch.tensor([FIRST, FIRST + INSIDE, 1 - INSIDE]).double())
    t = t.clamp(low, high)
    return t, torch.where(r < first, 0.0, torch.minimum(r, t))


def along(found: Cast, field: Callable[[Tensor], Tensor], room: Tensor) -> Tensor:
    """d field(h) / dh at h = 0, where field(-b) is what lies b before: exactly, or by steps of no more than the
    room."""
    if found.settings.derivative == "exact":
        zero = torch.zeros_like(room)
        return torch.func.jvp(field, (zero,), (torch.ones_like(zero),))[1]
    b = room.clamp(LEAST, found.settings.width)
    here = field(0 * b)
    whole, half = ((here - field(-share * b)) / (share * b)[:, None] for share in (1.0, 0.5))
    return whole if found.settings.derivative == "difference" else 2 * half - whole


def tangent_loss(found: Cast) -> Tensor:
    """A loss whose gradient is -2 aim du, aim = g / (rms + c), g = v - u - k (t - r) du."""
    (t, r), s = times(found), found.settings
    x = (1 - t)[:, None] * found.batch.x0 + t[:, None] * found.eps()
    first = flow_time(found.hand, torch.tensor([FIRST]).double())
    output, length = u(found, x, t, r), (t - r)[:, None]
    if s.form == "eulerian":
        velocity = v(found, x, t)
        du = along(found, lambda h: u(found, x + h[:, None] * velocity, t + h, r), t - torch.maximum(r, first))
    else:
        velocity = v(found, x - length * output, torch.maximum(r, first))
        du = along(found, lambda h: u(found, x, t, r - h), t - r)
    k = min(1.0, found.step.progress / s.warmup) if s.warmup else 1.0
    g = (velocity - output - k * length * du).detach()
    aim = g / (g.square().mean(1, keepdim=True).sqrt() + s.damping)
    return (-2 * aim * output).mean()


def walked(found: Cast, x: Tensor, t: Tensor, to: Tensor, count: int) -> Tensor:
    """Euler's equal steps of the guided teacher."""
    for i in range(count):
        now = t + (to - t) * i / count
        x = x + ((to - t) / count)[:, None] * v(found, x, now)
    return x


def trajectory_loss(found: Cast) -> Tensor:
    """Of three landings, against where the teacher's own steps lead, and what it says at x_t."""
    (t, r), s = times(found), found.settings
    x = (1 - t)[:, None] * found.batch.x0 + t[:, None] * found.eps()
    first = flow_time(found.hand, torch.tensor([FIRST]).double()).expand(len(t))
    m = torch.maximum(r + (t - r) * found.step.uniform("s"), first)
    x_m, x_first = (walked(found, x, t, to, s.solver_steps) for to in (m, first))
    aim = x_m - (m - r)[:, None] * u(found, x_m, m, r)
    end = walked(found, x_first, first, 0 * t, 1)
    output = u(found, x, t, r)
    return ((x - (t - r)[:, None] * output - aim.detach()).square().mean()
            + s.output_weight * (x - t[:, None] * u(found, x, t, 0 * t) - end).square().mean()
            + s.velocity_weight * (output - v(found, x, t)).square().mean())


def flow_map_sample(found: Cast, noise: Tensor, draw: Draw) -> Tensor:
    """DDIM's equal steps from unit noise, each told where it lands."""
    x, grid = noise, [*even_times(found.path.steps), 0.0]
    for t, r in zip(grid, grid[1:]):
        t, r = column(t, x)[:, 0], column(r, x)[:, 0]
        x0 = found.learner.x0(x, t, found.told[:len(x)].replace(r=r))
        x = found.hand.land(x0, x, t, r)
    return x


def flow_map(problem: Problem) -> Iterator[Check]:
    """As `path_rows.rows`, in the warm-up and after it, and the law of its times."""
    yield from table("flow_map", problem)
    places = sites(problem)
    for path in all_paths("flow_map"):
        settings = path.settings_of("flow_map")
        whole = settings.form == "trajectory"
        known, moments = ((trajectory_loss, (0.0,)) if whole
                          else (tangent_loss, [share * settings.warmup for share in SHARES]))
        yield Check(f"{path.name}: gradient against that of the loss written out, on {len(places)} noises; relative",
                    largest(*(trained("flow_map", path, place, known, value=whole, progress=moment)
                              for place in places for moment in moments)), 1e-6)
        yield Check(f"{path.name}: {DRAWN}, on {len(places)} noises; relative",
                    largest(*(sampled("flow_map", path, place, flow_map_sample) for place in places)), 1e-4)
    path = Path("mean and deviation", {"mean": 0.9, "std": 1.1, "alike": 0.3})
    found = cast("flow_map", path, problem)
    yield Check(f"{path.name}: moments of its times against those of their law, in standard errors",
                largest(*(off_law(times, law) for times, law in zip(found.method.times(problem.step(MANY)),
                                                                    laws(found)))), 6)


def laws(found: Cast) -> tuple[Tensor, Tensor]:
    """Of the later and the earlier of two draws: quantiles of the law at sqrt p and 1 - sqrt(1 - p), cut off at the
    ends; of r those of t for the share that is alike."""
    p = (torch.arange(10_000).double() + 0.5) / 10_000
    s = found.settings
    value = lambda p: 1 / (1 + (-s.mean - s.std * torch.special.ndtri(p)).exp())
    first, low, high = flow_time(found.hand, torch.tensor([FIRST, FIRST + INSIDE, 1 - INSIDE]).double())
    late, early = value(p.sqrt()).clamp(low, high), value(1 - (1 - p).sqrt())
    early = torch.where(early < first, 0.0, early.clamp(max=high))
    share = round(s.alike * 10)
    return late, torch.cat([late.repeat(share), early.repeat(10 - share)])
