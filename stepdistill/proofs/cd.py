"""Consistency distillation: the boundary is built in, and the loss vanishes at the product of the teacher's Heun
steps."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ..diffusion.consistency import consistency
from ..diffusion.contracts import Role
from ..methods.consistency.cd import CD, Settings
from .followers import following
from .paths_consistency import cd as paths
from .problem import Affine, Check, Problem, difference, gradient, largest, stock_times
from .trajectory import Trajectory, ddim_factor, heun_factor

COUNT, NODES, STEPS = 256, 18, 2


def made(problem: Problem, student: Role, target: Role) -> CD:
    settings = Settings(nodes=NODES)
    sampler = problem.sampler(CD.inference(settings, STEPS, problem.schedule))
    return CD(settings, {"teacher": problem.teacher, "student": student, "target": target}, problem.w, sampler)


def nodes(problem: Problem) -> torch.Tensor:
    """sigma_i^(1/7) evenly from 80, or as far as the schedule reaches, to 0.002, or its first time's, where networks
    know it."""
    known = stock_times()
    first, last = (problem.schedule.sigma(u) / problem.schedule.alpha(u) for u in (known[:1], known[-1:]))
    high, low = (f(*pair) ** (1 / 7) for f, pair in ((min, (80.0, last.item())), (max, (0.002, first.item()))))
    ratio = torch.linspace(high, low, NODES, dtype=torch.float64) ** 7
    if problem.name == "flow":
        return torch.cat([ratio / (1 + ratio), 1 - torch.arange(STEPS + 1).double() / STEPS])
    nearest = (problem.schedule.angle(known)[:, None] - ratio.atan()).abs().argmin(0)
    return torch.cat([known[nearest], 1 - torch.arange(STEPS).double() / STEPS, known[:1]])


def heun(problem: Problem, grid: torch.Tensor) -> Trajectory:
    """By Heun's steps, and Euler's to t = 0."""
    path, euler = (Trajectory.of(problem, grid, factor) for factor in (heun_factor, ddim_factor))
    inner = grid[1:] > 0
    return Trajectory(problem, grid, torch.where(inner[:, None], path.factors, euler.factors))


def identities(problem: Problem) -> Iterator[Check]:
    learner: Affine = problem.affine()
    network = learner.as_network(problem.kind)
    target = problem.affine()
    method, batch, step = made(problem, network,
                               target.as_network(problem.kind)), problem.batch(COUNT), problem.step(COUNT)
    x, origin = problem.normal(COUNT, problem.dim), method.grid[-1:].expand(COUNT)
    yield Check("what any network makes of a state at the origin, against the state; relative",
                difference(consistency(network(x, origin, batch.cond)), x), 1e-12)

    i, path = step.integers("node", len(method.grid) - 1), heun(problem, method.grid)
    found = gradient(method.loss(batch, step)["consistency"], learner)
    known = path.consistency_gradient(learner, batch, step, method.grid[i], method.grid[i + 1], target)
    yield Check("gradient against that with an exact, fixed target; relative", difference(found, known), 1e-9)

    student = path.consistent()
    root = made(problem, student, student).loss(batch, step)["consistency"].sqrt()
    yield Check("root of the loss at the product of the guided teacher's Heun steps", root.item(), 1e-9)

    away = (method.grid[:, None] - nodes(problem)).abs()
    yield Check("nodes from the nearest of Karras et al.'s, the sampler's and the origin, and those from the nearest "
                "node",
                largest(away.amin(1).max().item(), away.amin(0).max().item()), 1e-12)
    once = problem.sampler(CD.inference(Settings(), 1, problem.schedule))
    found, known = once(student, x, batch.cond), path.carried(x, torch.ones(COUNT, dtype=torch.float64), origin)
    yield Check("one step of the stock sampler against all the steps; relative", difference(found, known), 1e-9)
    yield from paths(problem)
    yield from following("cd", problem)
