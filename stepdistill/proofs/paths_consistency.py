"""Paths of cd, lcm and tcd: their losses and samplers written out."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .hand import LEVELS, Hand, distance
from .path_rows import Cast, rows
from .problem import Check, Problem

Draw = Callable[[int], Tensor]
KARRAS = (0.002, 80.0)                     # ends of the grid in sigma / alpha


def consistency(hand: Hand, x0: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    skip, out = hand.boundary(t)
    return skip * x + out * x0(x, t)


def karras_grid(hand: Hand, count: int, sampled: Tensor) -> Tensor:
    """sigma_i^(1/7) evenly between the ends, at whole times where the noise has a table, with `sampled` and the origin.

    Descending.
    """
    known = (torch.arange(LEVELS).double() + 1) / LEVELS
    reach = hand.angle(known[[0, -1]]).tan().tolist()
    low, high = max(KARRAS[0], reach[0]), min(KARRAS[1], reach[1])
    ratio = (high ** (1 / 7) + torch.arange(count).double() / (count - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    times = ratio / (1 + ratio) if hand.flow else (LEVELS * hand.time(ratio.atan())).round() / LEVELS
    return torch.cat([times, sampled, torch.tensor([hand.end], dtype=torch.float64)]).unique().flip(0)


def even_times(steps: int) -> list[float]:
    """Of LCMScheduler with as many original steps: floor(1000 / steps) apart. A flow's are 1 - i / steps."""
    return [1 - i * (LEVELS // steps) / LEVELS for i in range(steps)]


def node_times(found: Cast) -> list[float]:
    """floor(N i / k) nodes below the last, moved by the shift."""
    n, k = found.settings.nodes, found.path.steps
    times = torch.tensor([(n - n * i // k) / n for i in range(k)], dtype=torch.float64)
    return moved(times, found.settings.shift).tolist()


def moved(t: Tensor, shift: float) -> Tensor:
    """Towards noise: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def nodes(found: Cast) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t, s) as times, and what they are as nodes: t uniform, s `skip` nodes below or the data."""
    n, shift = found.settings.nodes, found.settings.shift
    i = found.step.integers("node", n) + 1
    j = (i - found.settings.skip).clamp(min=0)
    return moved(i.double() / n, shift), moved(j.double() / n, shift), i, j


def neighbours(found: Cast) -> tuple[Tensor, Tensor]:
    """(t, s) on cd's grid, which holds the times of the sampler too."""
    sampled = torch.tensor(even_times(found.path.steps), dtype=torch.float64)
    grid = karras_grid(found.hand, found.settings.nodes, sampled)
    i = found.step.integers("node", len(grid) - 1)
    return grid[i], grid[i + 1]


def settled(found: Cast) -> Tensor:
    """Where no rounding decides between Heun's rule and Euler's: up to the grid's own noisiest, and at pure noise."""
    ratio = found.hand.angle(neighbours(found)[0]).tan()
    return (ratio < KARRAS[1] * 1.1) | (ratio > 1e10)


def cd_loss(found: Cast) -> Tensor:
    """Heun's step of the guided teacher between neighbours of the grid, Euler's from pure noise and to the data."""
    hand, (t, s) = found.hand, neighbours(found)
    x = hand.noised(found.batch.x0, found.eps(), t)
    ratio_t, ratio_s = hand.angle(t).tan().abs()[:, None], hand.angle(s).tan().abs()[:, None]
    long = (ratio_t > 20) & (ratio_t > 3 * ratio_s) & (not hand.flow)
    euler = long | (s[:, None] == 0)
    heun = hand.heun(x, t, torch.where(s > 0, s, t), found.mean).nan_to_num()
    x_s = torch.where(euler, hand.ddim(x, t, s, found.mean), heun)
    aim = consistency(hand, found.averaged, x_s, s).detach()
    return distance(found.settings.loss, found.settings.huber_c)(consistency(hand, found.student, x, t), aim)


def lcm_loss(found: Cast) -> Tensor:
    """One DDIM step of the guided teacher over `skip` nodes, or the data under the same noise; at the data the target
    is the state itself."""
    hand, (t, s, *_) = found.hand, nodes(found)
    x = hand.noised(found.batch.x0, found.eps(), t)
    by_data = found.settings.bridge == "data"
    x_s = hand.noised(found.batch.x0, found.eps(), s) if by_data else hand.ddim(x, t, s, found.mean)
    aim = torch.where(s[:, None] > 0, consistency(hand, found.averaged, x_s, s), x_s).detach()
    return distance(found.settings.loss, found.settings.huber_c)(consistency(hand, found.student, x, t), aim)


def tcd_loss(found: Cast) -> Tensor:
    """As lcm's, compared at a node r drawn from the data's up to s; the data's is the scheduler's told time 0."""
    hand, (t, s, _, j) = found.hand, nodes(found)
    r = moved((found.step.uniform("landing") * (j + 1)).floor() / found.settings.nodes, found.settings.shift)
    s, r = s.clamp(min=hand.end), r.clamp(min=hand.end)
    x = hand.noised(found.batch.x0, found.eps(), t)
    x_s = hand.ddim(x, t, s, found.mean)
    aim = hand.land(found.averaged(x_s, s), x_s, s, r).detach()
    return distance(found.settings.loss, found.settings.huber_c)(hand.land(found.student(x, t), x, t, r), aim)


def cd_sample(found: Cast, noise: Tensor, draw: Draw) -> Tensor:
    return found.hand.multistep(found.drawn, noise, even_times(found.path.steps), draw)


def lcm_sample(found: Cast, noise: Tensor, draw: Draw) -> Tensor:
    return found.hand.multistep(found.drawn, noise, node_times(found), draw)


def tcd_sample(found: Cast, noise: Tensor, draw: Draw) -> Tensor:
    """By TCDScheduler; on a flow by Euler's steps without fresh noise, or as a consistency model."""
    times = node_times(found)
    if not found.hand.flow:
        return found.hand.strategic(found.drawn, noise, times, found.settings.gamma, draw)
    if found.settings.gamma == 0:
        return found.hand.deterministic(found.drawn, noise, [*times, 0.0])
    return found.hand.multistep(found.drawn, noise, times, draw)


def cd(problem: Problem) -> Iterator[Check]:
    yield from rows("cd", problem, cd_loss, cd_sample, kept=settled)


def lcm(problem: Problem) -> Iterator[Check]:
    yield from rows("lcm", problem, lcm_loss, lcm_sample)


def tcd(problem: Problem) -> Iterator[Check]:
    yield from rows("tcd", problem, tcd_loss, tcd_sample)
