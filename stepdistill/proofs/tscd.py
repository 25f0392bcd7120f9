"""TSCD: the loss vanishes where the student lands on the guided teacher's DDIM steps within its segment, not
where segments are yet to be merged, and there the discriminator is shown one thing twice."""
from __future__ import annotations

from collections.abc import Iterator
from math import log

import torch
from torch import Tensor

from ..diffusion.contracts import Role
from ..methods.consistency.tscd import TSCD, Settings
from .paths_tscd import paths
from .problem import Check, Problem, difference, largest, off_law, off_zero, stock_times
from .trajectory import Trajectory, ddim_factor, start

COUNT, MANY, NODES, STEPS = 256, 5_000, 40, 4


def made(problem: Problem, student: Role, steps: int = STEPS, discriminator: Role | None = None, **settings) -> TSCD:
    chosen = Settings(**{"nodes": NODES, "gan_weight": 0.1 if discriminator else 0.0, **settings})
    roles = {"teacher": problem.teacher, "student": student}
    sampler = problem.sampler(TSCD.inference(chosen, steps, problem.schedule))
    return TSCD(chosen, roles | ({"discriminator": discriminator} if discriminator else {}), problem.w, sampler)


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    batch, step, noise = problem.batch(COUNT), problem.step(COUNT), problem.normal(COUNT, problem.dim)
    path = Trajectory.of(problem, torch.linspace(1, 0, NODES + 1, dtype=torch.float64), ddim_factor)
    whole = path.carried(noise, torch.ones(COUNT, dtype=torch.float64), torch.zeros(COUNT, dtype=torch.float64))
    for steps in (1, 2, STEPS, 8):
        student = path.segmented(steps)
        _, _, r = made(problem, student, steps).times(step)
        anywhere = made(problem, path.landing(r), steps).student_loss(batch, step)["consistency"].sqrt()
        to_start = made(problem, student, steps, landing="start").student_loss(batch, step)["consistency"].sqrt()
        yield Check(f"roots of the {steps}-segment loss of students on the guided teacher's DDIM steps, at every r and "
                    "at the start", largest(anywhere.item(), to_start.item()), 1e-9)
        found = made(problem, student, steps).sampler(student, noise, batch.cond)
        twice = made(problem, path.segmented(2 * steps), steps, landing="start")
        before = twice.student_loss(batch, step)["consistency"]
        yield Check(f"the latter over that of a student of {2 * steps} segments, which has them to merge",
                    (to_start / before.sqrt()).item(), 1e-8)
        yield Check(f"its sample in {steps} steps against the teacher's in {NODES}; relative",
                    difference(found, whole), 1e-9)
    yield Check("moments of t, and of r given its segment and s, against the uniform laws', in standard errors",
                largest(*(drawn_times(problem, steps) for steps in (1, STEPS))), 6)
    yield from game(problem, path.segmented(STEPS))


def drawn_times(problem: Problem, steps: int) -> float:
    """t = i / N, s = (i - 1) / N, r = j / N with j from that of the segment's start to i - 1; not a number where any is
    none of these."""
    t, s, r = made(problem, problem.teacher, steps).times(problem.step(MANY))
    i, j, first = (NODES * t).round(), (NODES * r).round(), NODES * start(t, steps)
    if max((NODES * s - i + 1).abs().max(), (NODES * r - j).abs().max(), (first - j).max(), (j - i + 1).max()) > 1e-9:
        return float("nan")
    length, place = i - first, j - first                    # place is uniform on 0 ... length - 1
    inside = length > 1                                     # else it is 0 for sure
    given = torch.stack([place - (length - 1) / 2, place**2 - (length - 1) * (2 * length - 1) / 6], 1)[inside]
    return largest(off_law(i, torch.arange(1, NODES + 1).double()), off_zero(given))


def game(problem: Problem, consistent: Role) -> Iterator[Check]:
    """What the discriminator is shown, and when. consistent: a student that lands where the teacher does."""
    batch, step = problem.batch(COUNT), problem.step(COUNT)
    shown: list[Tensor] = []
    seen: list[Tensor] = []
    blind = lambda x, t, cond: shown.append(x.detach()) or seen.append(t) or 0 * x[:, :2]
    method = made(problem, consistent, discriminator=blind, landing="start")
    losses = method.student_loss(batch, step)
    losses |= method.critic_loss(batch, problem.step(COUNT, "critic+discriminator", kept=step.kept))
    yield Check("what the discriminator is shown as real and as fake there; relative", difference(shown[1], shown[2]),
                1e-7)
    off = max(abs(losses["gan"].item() - 0.1 * log(2)), abs(losses["discriminator"].item() - 2 * log(2)))
    yield Check("losses where it cannot tell, from 0.1 log 2 and 2 log 2", off, 1e-9)

    theta = torch.zeros(2, problem.dim, dtype=torch.float64, requires_grad=True)
    seen.clear()
    linear = lambda x, t, cond: seen.append(t) or x @ theta.T
    method = made(problem, problem.affine().as_network(problem.kind), discriminator=linear)
    method.student_loss(batch, step)
    critic = problem.step(COUNT, "critic+discriminator", kept=step.kept)
    found, = torch.autograd.grad(method.critic_loss(batch, critic)["discriminator"], theta)
    kept = problem.schedule.alpha(seen[1]) / problem.schedule.alpha(method.times(step)[2])
    known = (kept[:, None] * (step.kept["fake"] - step.kept["real"])).detach().mean(0).expand(2, -1) / 4
    yield Check("heads' slope at logit 0 against fake - real, under one noise; relative", difference(found, known),
                1e-5)

    seen.clear()
    wide = problem.step(MANY)
    method = made(problem, consistent, discriminator=blind)
    method.student_loss(problem.batch(MANY), wide)
    _, _, r = method.times(wide)
    at_start = r == (STEPS - 1) / STEPS
    law = stock_times(1 - 1 / STEPS) - 1 / 1000
    yield Check("times judged that lie below r, or not in its segment", ((seen[0] < r.clamp(min=1 / 1000) - 1e-9) |
                ((start(seen[0] + 1e-6, STEPS) - start(r + 1e-6, STEPS)).abs() > 1e-9)).sum().item(), 0)
    yield Check("moments of those from the start of the noisiest segment, against a uniform law's, in standard errors",
                off_law(seen[0][at_start], law), 6)
