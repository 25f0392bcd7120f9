"""BOOT: no loss at the signals of the guided teacher's steps from noise, whose last is its sample; these follow the
signal-ODE, and fine steps come to the exact flow."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.flow_map import secant_target
from ..methods.trajectory.boot import BOOT, Settings
from .paths_boot import boot as paths
from .problem import Check, FunctionRole, Problem, difference, off_law, reaching
from .trajectory import Trajectory, ddim_factor

COUNT, MANY, NODES = 256, 20_000, 20


def made(problem: Problem, student: Role, teacher: Role | None = None, **settings) -> BOOT:
    chosen = Settings(**{"nodes": NODES, **settings})
    roles = {"teacher": teacher or problem.teacher, "student": student}
    return BOOT(chosen, roles, problem.w, problem.sampler(BOOT.inference(chosen, 1, problem.schedule)))


def path(problem: Problem, steps: int) -> Trajectory:
    return Trajectory.of(problem, torch.linspace(1, 0, steps + 1, dtype=torch.float64), ddim_factor)


def signals(problem: Problem, way: Trajectory) -> FunctionRole:
    """The student who knows where this way is at every node that it is told, by the x_0 whose step from e lands there;
    at t = 1, where any does, that of the first step."""
    first = way.grid[1]

    def x0_of(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        r = torch.minimum(cond.r, first.expand(len(t)))
        return secant_target(x, way.carried(x, t, r), t, r, problem.schedule)
    return FunctionRole(problem.schedule, x0_of, problem.kind)


def identities(problem: Problem) -> Iterator[Check]:
    batch, step = problem.batch(COUNT, data=False), problem.step(COUNT)
    e, one = step.normal("start", batch.shape).double(), torch.ones(COUNT, dtype=torch.float64)
    for between in (1, 3):
        fine = path(problem, between * NODES)
        student, other = signals(problem, fine), signals(problem, path(problem, 2 * between * NODES))
        rest, usual = (made(problem, role, solver_steps=between).loss(batch, step)["bootstrap"]
                       for role in (student, other))
        yield Check(f"loss at the signals of the guided teacher's steps, {between} a node, over that at twice as many",
                    (rest / usual).item(), 1e-6)
        method = made(problem, student)
        drawn = method.sampler(method.sampler.telling(student), e, batch.cond)
        yield Check(f"its sample in one step against the teacher's in {between * NODES}; relative",
                    difference(drawn, fine.carried(e, one, 0 * one)), 1e-9)
    exact = problem.flow(e, one, 0 * one, problem.w)
    near, far = (difference(path(problem, steps).carried(e, one, 0 * one), exact) for steps in (160, 20))
    yield Check("one step against the exact flow at 160 nodes, over that at 20", near / far, 0.25)
    yield ode(problem)
    student, teacher = problem.affine(), problem.affine()
    yield Check("gradient that reaches the teacher",
                reaching(made(problem, student, teacher).loss(batch, step)["bootstrap"], teacher), 0)
    t = nodes_asked(problem)
    yield Check("moments of the nodes that are asked for, from a uniform law's, in standard errors",
                off_law(t, torch.arange(NODES).double() / NODES), 6)
    yield from paths(problem)


def nodes_asked(problem: Problem) -> Tensor:
    """s, as the student is told it last: one below each node."""
    role = FunctionRole(problem.schedule, lambda x, t, cond: x / 2)
    made(problem, role).loss(problem.batch(MANY, data=False), problem.step(MANY))
    return role.calls[-1][2].r


def ode(problem: Problem) -> Check:
    """Along the exact flow from e the signal's slope is -lambda' (x_0 - y), by a difference."""
    count, h = 64, 1e-4
    e, one = problem.normal(count, problem.dim), torch.ones(count, dtype=torch.float64)
    t = 0.2 + 0.6 * torch.arange(count).double() / count
    signal = lambda u: secant_target(e, problem.flow(e, one, u, problem.w), one, u, problem.schedule)
    # of the schedule that has e as its noise: x = a y + s e, a = alpha - q alpha_1, s = q = sigma / sigma_1
    q = lambda u: problem.schedule.sigma(u) / problem.schedule.sigma(one)
    level = lambda u: (q(u) / (problem.schedule.alpha(u) - q(u) * problem.schedule.alpha(one))).log()
    slope = lambda f: (f(t + h) - f(t - h)) / (2 * h)
    x_t = problem.flow(e, one, t, problem.w)
    x0 = problem.teacher(x_t, t, problem.guided_cond(count, problem.w)).x0
    # of that schedule the teacher's noise is x_0's rest: x = a x_0 + s e', e' the DDIM step's own
    known = -slope(level)[:, None] * (x0 - signal(t))
    return Check("slope of the exact flow's signal against the signal-ODE's; relative",
                 difference(slope(signal), known), 1e-4)
