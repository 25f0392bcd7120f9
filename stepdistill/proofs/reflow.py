"""Reflow: the coupling by the teacher's map is straightened with no loss, and then one step is exact; the independent
coupling is not, and one step of it is the mean, whatever the noise."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.schedule import like
from ..methods.trajectory.reflow import Reflow, Settings
from .paths_trajectory import reflow as paths
from .problem import Check, FunctionRole, Problem, difference, evenly, gradient, off_law, standard_errors

COUNT, FEW, MANY = 256, 5_000, 20_000


def made(problem: Problem, student: Role, steps: int = 1, **settings: bool) -> Reflow:
    sampler = problem.sampler(Reflow.inference(Settings(), steps, problem.schedule))
    return Reflow(Settings(**settings), {"teacher": problem.teacher, "student": student}, problem.w, sampler)


def shares(problem: Problem, t: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of the line, x_t = a y + b e: the DDIM step from e at t = 1 that believes in y. (B,) each."""
    schedule, start = problem.schedule, torch.ones_like(t)
    b = schedule.sigma(t) / schedule.sigma(start)
    return schedule.alpha(t) - b * schedule.alpha(start), b


def along_axes(problem: Problem, x: Tensor, share: Tensor) -> Tensor:
    """x (B, D) with its components along the axes of the data scaled, share (B, D)."""
    axes = torch.linalg.eigh(problem.covariance).eigenvectors
    return (x.double() @ axes * share) @ axes.T


def straight(problem: Problem, w: float) -> FunctionRole:
    """It knows the y of the pair whose line it is on: y - m = G (e - alpha_1 m), G = (C / (alpha_1^2 C +
    sigma_1^2))^(1/2), so y = m + (a + b / G)^-1 (x_t - alpha_t m)."""
    schedule, variances = problem.schedule, torch.linalg.eigvalsh(problem.covariance)
    alpha, sigma = (f(torch.ones(1, dtype=torch.float64)) for f in (schedule.alpha, schedule.sigma))
    gain = (variances / (alpha**2 * variances + sigma**2)).sqrt()

    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        (a, b), m = shares(problem, t), problem.guided_cond(len(t), w).text
        return m + along_axes(problem, x_t - like(schedule.alpha(t), m) * m, 1 / (a[:, None] + b[:, None] / gain))
    return FunctionRole(schedule, x0_of, problem.kind)


def independent(problem: Problem, offset: Tensor) -> FunctionRole:
    """The optimum where y knows nothing of e: E[y | a y + b e], and `offset` (B, D) off it."""
    variances = torch.linalg.eigvalsh(problem.covariance)

    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        (a, b), m = (each[:, None] for each in shares(problem, t)), cond.text
        return m + along_axes(problem, x_t - a * m, a * variances / (a**2 * variances + b**2)) + offset
    return FunctionRole(problem.schedule, x0_of, problem.kind)


def places(problem: Problem) -> Iterator[Check]:
    """What the student is told: a uniform place on the line, from the first stock time's, sigma / (alpha + sigma); or a
    step's own."""
    place = lambda t: problem.schedule.sigma(t) / (problem.schedule.alpha(t) + problem.schedule.sigma(t))
    ends, steps = (place(torch.tensor([1e-3, 1.0], dtype=torch.float64)),
                   torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    for distil, law, label in ((False, evenly(*ends.tolist()), "uniform law's on the line"),
                               (True, place(steps), "4 steps'")):
        student = FunctionRole(problem.schedule, lambda x, t, cond: x)
        made(problem, student, 4, distil=distil).loss(problem.paired(FEW), problem.step(FEW))
        yield Check(f"moments of its places against the {label}, in standard errors",
                    off_law(place(student.calls[0][1]), law), 6)


def identities(problem: Problem) -> Iterator[Check]:
    batch, step = problem.paired(COUNT, w=problem.w), problem.step(COUNT)
    student, other = straight(problem, problem.w), straight(problem, 1.0)
    for distil, label in ((False, "loss along the lines"), (True, "loss at the times of 4 steps")):
        rest, usual = (made(problem, role, 4, distil=distil).loss(batch, step)["velocity"] for role in (student, other))
        yield Check(f"{label} where the pairs' lines are known, over the unguided pairs'", (rest / usual).item(), 1e-18)
    yield from places(problem)
    for steps in (1, 4):
        drawn = made(problem, student, steps).sampler(student, batch.pairs.noise, batch.cond)
        yield Check(f"its sample in {steps} steps against the picture; relative", difference(drawn, batch.x0), 1e-9)

    affine = problem.affine()
    method = made(problem, affine)
    found = gradient(method.loss(batch, step)["velocity"], affine)
    t = method.time(step.uniform("t"))
    (a, b), sigma = (like(each, batch.x0) for each in shares(problem, t)), like(problem.schedule.sigma(t), batch.x0)
    x_t, ratio = a * batch.x0 + b * batch.pairs.noise, like(problem.schedule.alpha(t), batch.x0) / sigma
    # u = x_t / sigma - (1 + ratio) x_0
    slope = 2 * (1 + ratio) ** 2 * (affine.m + x_t @ affine.S.T - batch.x0) / problem.dim
    known = torch.cat([slope.mean(0), (slope[:, :, None] * x_t[:, None, :]).mean(0).flatten()]).detach()
    yield Check("gradient against that of the velocity's regression; relative", difference(found, known), 1e-9)

    offset = torch.zeros(MANY, problem.dim, dtype=torch.float64, requires_grad=True)
    batch, best = replace(problem.batch(MANY), pairs=problem.paired(MANY).pairs), independent(problem, offset)
    slope = MANY * torch.autograd.grad(made(problem, best).loss(batch, problem.step(MANY))["velocity"], offset)[0]
    yield Check("independent pairs: slope at their optimum, in standard errors",
                standard_errors(slope, best.calls[0][0]), 6)
    once = made(problem, best).sampler(best, batch.pairs.noise, batch.cond).detach()
    yield Check("its one step against the mean, over the deviation of the data",
                ((once - problem.means[0]).abs().max() / 0.3).item(), 1e-9)
    yield from paths(problem)
