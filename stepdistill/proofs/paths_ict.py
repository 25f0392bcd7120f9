"""Paths of ict: its loss written out."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .path_rows import Cast, rows
from .paths_consistency import Draw, consistency, even_times
from .problem import Check, Problem

LEVELS, LEAST, MOST = 1000, 0.002, 80.0              # ends of the grid in sigma / alpha


def node_count(found: Cast) -> int:
    """N, 2 N, 4 N, ... up to M, each for as long."""
    s, counts = found.settings, [found.settings.first_nodes]
    while counts[-1] < s.last_nodes:
        counts.append(counts[-1] * 2)
    return min(counts[int(found.step.progress * len(counts))], s.last_nodes)


def levels(found: Cast, t: Tensor) -> Tensor:
    return found.hand.angle(t).tan().clamp(LEAST, MOST)


def grid(found: Cast) -> Tensor:
    """sigma_i^(1/7) evenly between the ends, which are the data's time and 1, at whole times where the noise has a
    table, and the sampler's times. Ascending."""
    hand, n = found.hand, node_count(found)
    reach = hand.angle(torch.tensor([1 / LEVELS, 1.0], dtype=torch.float64)).tan()
    low, high = max(LEAST, reach[0].item()) ** (1 / 7), min(MOST, reach[1].item()) ** (1 / 7)
    level = (low + torch.arange(1, n).double() / n * (high - low)) ** 7
    inner = level / (1 + level) if hand.flow else (LEVELS * hand.time(level.atan())).round() / LEVELS
    ends = torch.tensor([hand.end, 1.0, *even_times(found.path.steps)], dtype=torch.float64)
    return torch.cat([inner, ends]).unique()


def pair(found: Cast) -> tuple[Tensor, Tensor]:
    """(t, s), neighbours: erf((ln t - m) / s sqrt 2) - erf((ln s - m) / s sqrt 2), of all that there is."""
    nodes, s = grid(found), found.settings
    place = torch.erf((found.hand.angle(nodes).tan().log() - s.mean) / (s.std * 2**0.5))
    reached = (place[1:] - place[0]) / (place[-1] - place[0])
    i = torch.searchsorted(reached, found.step.uniform("node"), right=True)
    return nodes[i + 1], nodes[i]


def ict_loss(found: Cast) -> Tensor:
    """((|x - y|^2 + c^2 d)^(1/2) - c d^(1/2)) / d^(1/2) between neighbours under one noise, over the distance of their
    levels."""
    hand, (t, s), c = found.hand, pair(found), found.settings.huber_c
    near, far = (consistency(hand, found.student, hand.noised(found.batch.x0, found.eps(), u), u) for u in (s, t))
    d = far.shape[1]
    distance = ((far - near.detach()).square().sum(1) + c**2 * d).sqrt() - c * d**0.5
    return (distance / d**0.5 / (levels(found, t) - levels(found, s))).mean()


def ict_sample(found: Cast, noise: Tensor, draw: Draw) -> Tensor:
    return found.hand.multistep(found.drawn, noise, even_times(found.path.steps), draw)


def ict(problem: Problem) -> Iterator[Check]:
    yield from rows("ict", problem, ict_loss, ict_sample)
