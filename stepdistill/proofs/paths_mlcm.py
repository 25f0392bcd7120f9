"""Paths of mlcm: the states that it makes without data, and its loss, written out."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .path_rows import Cast, rows
from .problem import Check, Problem


def segments(found: Cast) -> tuple[Tensor, Tensor, Tensor]:
    """(t, s, r): node i of N, the one below, and the start of the segment of N / k nodes."""
    n, k = found.settings.nodes, found.path.steps
    i = found.step.integers("node", n) + 1
    return tuple(each.double() / n for each in (i, i - 1, (i - 1) // (n // k) * (n // k)))


def whole(found: Cast) -> tuple[Tensor, Tensor, Tensor]:
    """(t, s, 0): the end i / M, and the one below."""
    ends = found.settings.ends
    i = found.step.integers("node", ends) + 1
    return i.double() / ends, (i - 1).double() / ends, torch.zeros(len(i), dtype=torch.float64)


def of_teacher(found: Cast, t: Tensor) -> Tensor:
    """From noise by the teacher's even steps, the last of which is cut short at t."""
    x, at, n = found.step.normal("start", found.batch.shape).double(), torch.ones_like(t), found.settings.state_steps
    for i in range(n):
        to = (1 - (i + 1) / n) * torch.ones_like(t)
        to = torch.where(to < t, t, to)
        on = at > to
        x = torch.where(on[:, None], found.hand.ddim(x, at, torch.where(on, to, at), found.mean), x)
        at = to
    return x


def ends_below(found: Cast) -> list[float]:
    """floor(M i / k) ends below the last."""
    m, k = found.settings.ends, found.path.steps
    return [(m - m * i // k) / m for i in range(k)]


def of_student(found: Cast, t: Tensor) -> Tensor:
    """The student's sample, noised anew to t."""
    normal = lambda name: found.step.normal(name, found.batch.shape).double()
    sample = found.hand.multistep(found.student, normal("start"), ends_below(found), lambda i: normal(f"renoise {i}"))
    return found.hand.noised(sample, found.eps(), t)


def bridged(found: Cast, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """By one of the teacher's steps between nodes, by some between ends."""
    n = 1 if found.settings.stage == "segments" else found.settings.bridge_steps
    for i in range(n):
        x = found.hand.ddim(x, t + (s - t) * i / n, t + (s - t) * (i + 1) / n, found.mean)
    return x


def mlcm_loss(found: Cast) -> Tensor:
    """Where the student's own step from x_t lands, against where it lands from the state below."""
    hand, by_segments = found.hand, found.settings.stage == "segments"
    t, s, r = segments(found) if by_segments else whole(found)
    with torch.no_grad():
        x = of_teacher(found, t) if by_segments else of_student(found, t)
        x_s = bridged(found, x, t, s)
        aim = torch.where((s > r)[:, None], hand.land(found.student(x_s, s), x_s, s, r), x_s)
    return (hand.land(found.student(x, t), x, t, r) - aim).square().mean()


def mlcm_sample(found: Cast, noise: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    """By DDIM over the segments; of the whole as a consistency model, at ends."""
    if found.settings.stage == "segments":
        k = found.path.steps
        return found.hand.deterministic(found.drawn, noise, [1 - i / k for i in range(k + 1)])
    return found.hand.multistep(found.drawn, noise, ends_below(found), draw)


def mlcm(problem: Problem) -> Iterator[Check]:
    yield from rows("mlcm", problem, mlcm_loss, mlcm_sample)
