"""Paths of mcm: its loss written out."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .path_rows import Cast, rows
from .paths_trajectory import evenly_sampled
from .problem import Check, Problem


def node_count(found: Cast) -> int:
    """N (M / N)^(progress / grown), M from there on, to the nearest that fills every segment alike."""
    s, k = found.settings, found.path.steps
    share = min(found.step.progress / s.grown, 1.0)
    return k * round(round(s.first_nodes * (s.last_nodes / s.first_nodes) ** share) / k)


def addim(found: Cast, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """alpha_s x_0 + (sigma_s^2 + z / mean eps^2)^(1/2) eps, z = (alpha_s - alpha_t sigma_s / sigma_t)^2 of the mean
    squared error of x_0, times eta."""
    hand, mean = found.hand, found.mean
    (a, g), (a_s, g_s) = hand.at(t), hand.at(s)
    x0, eps = hand.clean(x, a, g, mean), hand.noise(x, a, g, mean)
    missing = found.settings.eta * (x0 - found.batch.x0).square().mean(1, keepdim=True)
    z = (a_s - a * g_s / g) ** 2 * missing
    return a_s * x0 + torch.sqrt(g_s**2 + z / eps.square().mean(1, keepdim=True)) * eps


def mcm_loss(found: Cast) -> Tensor:
    """The x_0 with which one step comes to where the bridge, and the student's own step from there to the start of the
    segment, come."""
    hand, n, k, settings = found.hand, node_count(found), found.path.steps, found.settings
    i = found.step.integers("node", n) + 1
    begin = (i - 1) // (n // k) * (n // k)
    t, s, r = (each.double() / n for each in (i, i - 1, begin))
    x = hand.noised(found.batch.x0, found.eps(), t)
    by_data = settings.bridge == "data"
    x_s = hand.noised(found.batch.x0, found.eps(), s) if by_data else addim(found, x, t, s)
    x_r = torch.where((s > r)[:, None], hand.land(found.student(x_s, s), x_s, s, r), x_s)
    square = (found.student(x, t) - hand.secant(x, x_r, t, r).detach()).square().mean(1)
    snr = hand.snr(t)[:, 0]
    weight = snr + 1 if settings.weight == "v" else snr.clamp(min=1)
    return (weight * (square.sqrt() if settings.loss == "norm" else square)).mean()


def mcm(problem: Problem) -> Iterator[Check]:
    yield from rows("mcm", problem, mcm_loss, evenly_sampled)
