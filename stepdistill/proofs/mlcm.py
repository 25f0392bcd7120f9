"""MLCM: its states are the guided teacher's own, its two losses vanish where the student lands on the teacher's steps,
and it samples so."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Role
from ..methods.consistency.mlcm import MLCM, Settings
from .paths_mlcm import mlcm as paths
from .problem import Check, FunctionRole, Problem, difference, largest, moments, off_law, off_zero
from .trajectory import Trajectory, ddim_factor

COUNT, MANY, NODES, STEPS, ENDS, BRIDGE = 256, 20_000, 40, 4, 8, 3


def made(problem: Problem, student: Role, steps: int = STEPS, **settings) -> MLCM:
    chosen = Settings(**{"nodes": NODES, "ends": ENDS, "bridge_steps": BRIDGE, **settings})
    sampler = problem.sampler(MLCM.inference(chosen, steps, problem.schedule))
    return MLCM(chosen, {"teacher": problem.teacher, "student": student}, problem.w, sampler)


def even_path(problem: Problem, steps: int) -> Trajectory:
    return Trajectory.of(problem, torch.linspace(1, 0, steps + 1, dtype=torch.float64), ddim_factor)


def identities(problem: Problem) -> Iterator[Check]:
    batch, step, noise = problem.batch(COUNT, data=False), problem.step(COUNT), problem.normal(COUNT, problem.dim)
    one, zero = torch.ones(COUNT, dtype=torch.float64), torch.zeros(COUNT, dtype=torch.float64)
    path = even_path(problem, NODES)
    for steps in (1, STEPS, 8):
        student = path.segmented(steps)
        rest, usual = (made(problem, each, steps).loss(batch, step)["consistency"]
                       for each in (student, path.segmented(2 * steps)))
        yield Check(f"{steps}-segment loss at the guided teacher's DDIM steps, over that at twice the segments",
                    (rest / usual).item(), 1e-8)
        yield Check(f"its sample in {steps} steps against the teacher's in {NODES}; relative",
                    difference(made(problem, student, steps).sampler(student, noise, batch.cond),
                               path.carried(noise, one, zero)), 1e-9)
    fine = even_path(problem, ENDS * BRIDGE)
    student = fine.landing(zero)
    rest, usual = (made(problem, each, stage="whole").loss(batch, step)["consistency"]
                   for each in (student, path.segmented(2)))
    yield Check("loss of the whole at the guided teacher's DDIM steps, over that at two segments",
                (rest / usual).item(),
                1e-8)
    found = made(problem, student, 1, stage="whole").sampler(student, noise, batch.cond)
    yield Check(f"its sample in one step against the teacher's in {ENDS * BRIDGE}; relative",
                difference(found, fine.carried(noise, one, zero)), 1e-4)       # LCMScheduler's table is float32
    yield from states(problem)
    yield from paths(problem)


def states(problem: Problem) -> Iterator[Check]:
    """What the student is asked about. Both stages ask it last at x_t."""
    batch, step, wide = problem.batch(COUNT, data=False), problem.step(COUNT), problem.step(MANY)
    start = step.normal("start", batch.shape).double()
    for count in (10, NODES):                                          # steps that hold every fourth node, and all
        role = FunctionRole(problem.schedule, lambda x, t, cond: x / 2)
        method = made(problem, role, state_steps=count)
        method.loss(batch, step)
        x_t, t, _ = role.calls[-1]
        yield Check(f"states that {count} of the teacher's steps from noise make, against their closed form; relative",
                    difference(x_t, walked(problem, start, t, count)), 1e-5)
    role = even_path(problem, ENDS * BRIDGE).landing(torch.zeros(MANY, dtype=torch.float64))
    made(problem, role, stage="whole").loss(problem.batch(MANY, data=False), wide)
    x_t, t, _ = role.calls[-1]
    law = spread(problem, t)
    centred = (x_t.double() - problem.schedule.alpha(t)[:, None] * problem.guided_cond(MANY, problem.w).text)
    along = centred @ problem.axes[1] / law.sqrt()
    at_unit = moments(along) - torch.cat([torch.zeros(problem.dim), torch.eye(problem.dim).flatten()]).double()
    yield Check("mean and covariance of states of the whole, noised samples of the student's, in standard errors",
                off_zero(at_unit), 6)
    yield Check("moments of the times of both stages against uniform laws', in standard errors",
                largest(*(off_law((n * made(problem, role, **chosen).times(wide)[0]).round(),
                                  torch.arange(1, n + 1).double())
                          for n, chosen in ((NODES, {}), (ENDS, {"stage": "whole"})))), 6)


def walked(problem: Problem, start: Tensor, t: Tensor, count: int) -> Tensor:
    """Where `count` even DDIM steps down from noise arrive at t, the last of them cut short: a factor a step and
    axis."""
    (variances, axes), mean = problem.axes, problem.guided_cond(len(t), problem.w).text
    one = torch.ones_like(t)
    along, at = (start - problem.schedule.alpha(one)[:, None] * mean) @ axes, one
    for i in range(count):
        to = torch.maximum(one - (i + 1) / count, t)
        along = along * ddim_factor(problem.schedule, variances, at[:, None], to[:, None])
        at = to
    return problem.schedule.alpha(t)[:, None] * mean + along @ axes.T


def spread(problem: Problem, t: Tensor) -> Tensor:
    """(B, D) variances along the axes of the student's one sample, ENDS * BRIDGE of the teacher's steps from the last
    noise, noised to t."""
    variances, grid = problem.axes[0], torch.linspace(1, 0, ENDS * BRIDGE + 1, dtype=torch.float64)
    factors = ddim_factor(problem.schedule, variances, grid[:-1, None], grid[1:, None])
    sampled, low = torch.ones_like(variances), 0
    for i in range(STEPS):                                # noised anew to 1 - i / k, and carried from there to the data
        low = i * ENDS * BRIDGE // STEPS
        u = grid[low:low + 1]
        begun = torch.ones_like(variances) if i == 0 else (problem.schedule.alpha(u) ** 2 * sampled
                                                           + problem.schedule.sigma(u) ** 2)
        sampled = factors[low:].prod(0) ** 2 * begun
    alpha, sigma = problem.schedule.alpha(t)[:, None], problem.schedule.sigma(t)[:, None]
    return alpha**2 * sampled + sigma**2
