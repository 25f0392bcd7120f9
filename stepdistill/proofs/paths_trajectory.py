"""Paths of guided, progressive, snapfusion, tract, kd and reflow: their losses and samplers written out."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from .hand import LEVELS, distance, guided_mean
from .path_rows import Cast, rows
from .problem import Check, Problem

Draw = Callable[[int], Tensor]


def weighted(found: Cast, t: Tensor, aim: Tensor, x: Tensor, weight: str) -> Tensor:
    """max(SNR, 1) or SNR + 1 times the mean squared error of the student's x_0."""
    snr = found.hand.snr(t)
    factor = snr.clamp(min=1) if weight == "truncated" else snr + 1
    return (factor * (found.student(x, t) - aim.detach()).square()).mean()


def guided_loss(found: Cast) -> Tensor:
    """At any whole time, the guided teacher's x_0."""
    t = ((found.step.uniform("t") * LEVELS).floor() + 1) / LEVELS
    x = found.hand.noised(found.batch.x0, found.eps(), t)
    return weighted(found, t, found.hand.teacher(x, t, found.mean), x, found.settings.weight)


def trailing_times(found: Cast, steps: int) -> Tensor:
    """As EulerDiscreteScheduler and DDIMScheduler round trailing steps, and the data; a flow's are not rounded."""
    i = torch.arange(steps + 1).double()
    return 1 - i / steps if found.hand.flow else (LEVELS - i * LEVELS / steps).round() / LEVELS


def progressive_loss(found: Cast) -> Tensor:
    """The x_0 with which one step comes to where the teacher's two come."""
    hand, grid = found.hand, trailing_times(found, 2 * found.path.steps)
    i = found.step.integers("step", found.path.steps)
    t, m, r = (grid[2 * i + j] for j in range(3))
    x = hand.noised(found.batch.x0, found.eps(), t)
    x_r = hand.ddim(hand.ddim(x, t, m, found.mean), m, r, found.mean)
    return weighted(found, t, hand.secant(x, x_r, t, r), x, found.settings.weight)


def snapfusion_loss(found: Cast) -> Tensor:
    """As progressive's, of a student that is guided as its teacher is in a share of the steps, and the data's x_0."""
    hand, s, grid = found.hand, found.settings, trailing_times(found, 2 * found.path.steps)
    i = found.step.integers("step", found.path.steps)
    t, m, r = (grid[2 * i + j] for j in range(3))
    x, cond = hand.noised(found.batch.x0, found.eps(), t), found.batch.cond
    text = guided_mean(cond, found.w if found.step.shared("guided") < s.guided_share else 1.0)
    aim = hand.secant(x, hand.ddim(hand.ddim(x, t, m, text), m, r, text), t, r)
    snr = hand.snr(t)
    factor = snr.clamp(min=1) if s.weight == "truncated" else snr + 1
    # a network that is affine in its text, guided, is itself at the guided text
    apart = found.learner.x0(x, t, Condition(text=text)) - aim.detach()
    off = found.learner.x0(x, t, Condition(text=cond.text)) - found.batch.x0
    return (factor * (apart.square() + s.denoising_weight * off.square())).mean()


def guided_sample(found: Cast, noise: Tensor, draw: Draw) -> Tensor:
    """As `evenly_sampled`, of a student that its pipeline guides at the middle of the scales."""
    scale = found.path.scale(found.problem)
    text = guided_mean(found.batch.cond, scale if isinstance(scale, float) else sum(scale) / 2)[:len(noise)]
    x0 = lambda x, t: found.learner.x0(x, t, Condition(text=text))
    times = trailing_times(found, found.path.steps)
    scaled = not found.hand.flow and LEVELS % found.path.steps
    return found.hand.deterministic(x0, found.hand.at(times[:1])[1] * noise if scaled else noise, times.tolist())


def tract_loss(found: Cast) -> Tensor:
    """The x_0 with which one step comes to where the teacher's step, and the target's to the segment's end, come."""
    hand, n = found.hand, found.settings.nodes
    i = found.step.integers("node", n) + 1
    end = (i - 1) // (n // found.path.steps) * (n // found.path.steps)
    t, s, r = (each.double() / n for each in (i, i - 1, end))
    x = hand.noised(found.batch.x0, found.eps(), t)
    x_s = hand.ddim(x, t, s, found.mean)
    x_r = torch.where((s > r)[:, None], hand.land(found.averaged(x_s, s), x_s, s, r), x_s)
    return weighted(found, t, hand.secant(x, x_r, t, r), x, "truncated")


def kd_loss(found: Cast) -> Tensor:
    """One of the student's steps along a pair's way, from its state to that of the next."""
    pairs, k, every = found.batch.pairs, found.path.steps, found.path.nodes // found.path.steps
    j, rows_ = found.step.integers("leg", k), torch.arange(len(found.batch))
    states = torch.cat([pairs.noise[:, None], pairs.nodes[:, every - 1::every]], 1)
    x, t, r = states[rows_, j], 1 - j.double() / k, 1 - (j + 1).double() / k
    return distance(found.settings.loss)(found.hand.land(found.student(x, t), x, t, r), states[rows_, j + 1])


def reflow_loss(found: Cast) -> Tensor:
    """eps - x_0 of the student on the line from the noise e to the picture y, against the line's own."""
    hand, u, y, e = found.hand, found.step.uniform("t"), found.batch.x0, found.batch.pairs.noise
    if found.settings.distil:
        t = 1 - (u * found.path.steps).floor() / found.path.steps
    else:                                      # uniform in sigma / (alpha + sigma), from the first time to the last
        a, s = hand.at(torch.tensor([1 / LEVELS, 1.0], dtype=torch.float64))
        low, high = (s / (a + s))[:, 0]
        place = low + (high - low) * u
        t = hand.time(torch.atan2(place, 1 - place))
    start = torch.ones_like(t)
    (a, s), (a_1, s_1) = hand.at(t), hand.at(start)
    x = hand.land(y, e, start, t)
    x0 = found.student(x, t)
    measure = distance(found.settings.loss, found.settings.huber_c)
    return measure((x - a * x0) / s - x0, (e - a_1 * y) / s_1 - y)


def evenly_sampled(found: Cast, noise: Tensor, draw: Draw) -> Tensor:
    """DDIM's equal steps from unit noise. Where their number does not divide 1000 they are EulerDiscreteScheduler's,
    whose first state is sigma_1 times that."""
    times = trailing_times(found, found.path.steps)
    scaled = not found.hand.flow and LEVELS % found.path.steps
    start = found.hand.at(times[:1])[1] if scaled else 1.0
    return found.hand.deterministic(found.drawn, start * noise, times.tolist())


def guided(problem: Problem) -> Iterator[Check]:
    yield from rows("guided", problem, guided_loss, evenly_sampled)


def progressive(problem: Problem) -> Iterator[Check]:
    yield from rows("progressive", problem, progressive_loss, evenly_sampled, 1e-8)


def snapfusion(problem: Problem) -> Iterator[Check]:
    yield from rows("snapfusion", problem, snapfusion_loss, guided_sample, 1e-8)


def tract(problem: Problem) -> Iterator[Check]:
    yield from rows("tract", problem, tract_loss, evenly_sampled)


def kd(problem: Problem) -> Iterator[Check]:
    yield from rows("kd", problem, kd_loss, evenly_sampled)


def reflow(problem: Problem) -> Iterator[Check]:
    yield from rows("reflow", problem, reflow_loss, evenly_sampled)
