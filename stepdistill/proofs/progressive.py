"""Progressive distillation: the target is two steps of the guided teacher in one, at the scale that a student is told,
and a halving of many steps comes to the exact flow."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Batch, Condition, Role
from ..diffusion.draws import Step
from ..diffusion.guidance import guided, self_guided
from ..diffusion.schedule import like
from ..diffusion.solvers import ddim
from ..methods.base import Guidance
from ..methods.trajectory.progressive import Progressive, Settings
from ..models.schedulers import stock_call, stock_scheduler
from .paths_trajectory import progressive as paths
from .problem import Affine, Check, FunctionRole, Problem, difference, gradient, largest, reaching

COUNT, STEPS = 256, 4


def made(problem: Problem, teacher: Role, student: Role, steps: int = STEPS, w: Guidance | None = None,
         **settings: Any) -> Progressive:
    chosen = Settings(**settings)
    sampler = problem.sampler(Progressive.inference(chosen, steps, problem.schedule))
    return Progressive(chosen, {"teacher": teacher, "student": student}, problem.w if w is None else w, sampler)


def grid_of(problem: Problem, steps: int) -> Tensor:
    """The times of a student of `steps` steps and those between, (2 steps + 1,)."""
    return made(problem, problem.teacher, problem.teacher, steps).grid


def stock_grids(problem: Problem) -> Check:
    """Stages of 96 and 48 steps: what a student is trained at, against what the stock scheduler tells, and where its
    teacher was asked."""
    apart = []
    for steps in (96, 48, 16):
        grid = grid_of(problem, steps)
        stock = stock_call(Progressive.inference(Settings(), steps, problem.schedule), problem.schedule)
        scheduler = stock_scheduler(stock.scheduler, stock.config, problem.scheduler)
        if problem.name == "flow":
            scheduler.set_timesteps(sigmas=stock.call["sigmas"])
            times = scheduler.timesteps.double() / 1000
        else:
            scheduler.set_timesteps(steps)
            times = (scheduler.timesteps.double() + 1) / 1000
        apart.append((grid[:-1:2] - times).abs().max().item())
        if (grid.diff() >= 0).any():
            apart.append(1.0)
    return Check("times of the student at 96, 48 and 16 steps from those that the stock scheduler tells",
                 largest(*apart), 1e-6)


def gain(problem: Problem, t: Tensor, r: Tensor) -> Tensor:
    """What a DDIM step from t to r leaves of x - alpha m along the axes of the data, (B, D):
    (alpha_r alpha_t C + sigma_r sigma_t) / (alpha_t^2 C + sigma_t^2)."""
    variances = torch.linalg.eigvalsh(problem.covariance)
    alpha_t, sigma_t, alpha_r, sigma_r = (f(u)[:, None] for u in (t, r)
                                          for f in (problem.schedule.alpha, problem.schedule.sigma))
    return (alpha_r * alpha_t * variances + sigma_r * sigma_t) / (alpha_t**2 * variances + sigma_t**2)


def nearest(grid: Tensor, t: Tensor) -> Tensor:
    """Where in the grid t (B,) is, at most two before its end: (B,) int64."""
    return (grid[None] - t[:, None]).abs().argmin(1).clamp(max=len(grid) - 3)


def closed(problem: Problem, steps: int, w: float | None) -> FunctionRole:
    """The student whose one step is two of the teacher guided at w, or at the scale that it is told:
    x_0 = m + (G(t, m) G(m, r) - q) / (alpha_r - q alpha_t) (x_t - alpha_t m), q = sigma_r / sigma_t."""
    told = lambda cond, count: problem.guided_cond(count, cond.w if w is None else w).text
    return two_steps(problem, steps, told)


def two_steps(problem: Problem, steps: int, told: Callable[[Condition, int], Tensor]) -> FunctionRole:
    """As `closed`, where the teacher's data have the mean told(cond, B), (B, D)."""
    schedule, axes = problem.schedule, torch.linalg.eigh(problem.covariance).eigenvectors
    grid = grid_of(problem, steps)

    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        i, mean = nearest(grid, t), told(cond, len(t))
        t, m, r = (grid[i + j] for j in range(3))
        q = (schedule.sigma(r) / schedule.sigma(t))[:, None]
        factor = (gain(problem, t, m) * gain(problem, m, r) - q) / (schedule.alpha(r)[:, None] - q
                                                                    * schedule.alpha(t)[:, None])
        return mean + ((x_t.double() - like(schedule.alpha(t), mean) * mean) @ axes * factor) @ axes.T
    return FunctionRole(schedule, x0_of, problem.kind)


def halved(problem: Problem, steps: int, to: int) -> Role:
    """The students of a halving from the guided teacher's 2 `steps`, each the perfect one of its stage, up to that of
    `to` steps."""
    role: Role = problem.teacher
    while steps >= to:
        method, grid = made(problem, role, role, steps), grid_of(problem, steps)

        def x0_of(x_t: Tensor, t: Tensor, cond: Condition, method=method, grid=grid) -> Tensor:
            i = nearest(grid, t)
            return method.target(x_t, *(grid[i + j] for j in range(3)), cond, problem.w)
        role, steps = self_guided(FunctionRole(problem.schedule, x0_of, problem.kind),
                                  guidance_embedding=False), steps // 2
    return role


def identities(problem: Problem) -> Iterator[Check]:
    batch, step, noise = problem.batch(COUNT), problem.step(COUNT), problem.normal(COUNT, problem.dim)
    yield stock_grids(problem)
    rest, usual = (made(problem, problem.teacher, closed(problem, STEPS, w)).loss(batch, step)["progressive"]
                   for w in (problem.w, 1.0))
    yield Check("loss at the closed form of the guided teacher's two steps, over that at the unguided's",
                (rest / usual).item(), 1e-18)

    teacher, student = scaled_teacher(problem), closed(problem, STEPS, None)
    rest = made(problem, self_guided(teacher, guidance_embedding=True), student, w=(1.0, problem.w),
                guidance_embedding=True).loss(batch, step)["progressive"]
    yield Check("the same of a teacher and a student that are told a scale of a range", (rest / usual).item(), 1e-18)
    scales = torch.stack([cond.w for _, _, cond in (*teacher.calls, *student.calls)])
    yield Check("samples whose student and teacher's two steps are not all told one scale",
                (scales != scales[0]).any(0).sum().item(), 0)

    for steps in (1, STEPS):
        drawn = made(problem, problem.teacher, student := closed(problem, steps, problem.w),
                     steps).sampler(student, noise, batch.cond)
        far = ddim(guided(problem.teacher, problem.w), noise, grid_of(problem, steps), batch.cond)
        yield Check(f"sample in {steps} steps against the guided teacher's in {2 * steps}; relative",
                    difference(drawn, far), 1e-9)

    small, cond, start = noise[:16], batch.cond[:16], torch.ones(16, dtype=torch.float64)
    exact = problem.flow(small, start, 0 * start, problem.w)
    near, far = (difference(halved(problem, steps, 1)(small, start, cond).x0, exact) for steps in (64, 8))
    yield Check("one step against the exact flow, after a halving from 128, over that after one from 16",
                near / far, 0.25)

    student, teacher = problem.affine(), problem.affine()
    found = gradient(made(problem, problem.teacher, student).loss(batch, step)["progressive"], student)
    known = _slope(problem, batch, step, student)
    yield Check("gradient against that of max(SNR, 1) |x_0 - closed form|^2; relative", difference(found, known), 1e-9)
    yield Check("gradient that reaches the teacher",
                reaching(made(problem, teacher, student).loss(batch, step)["progressive"], teacher), 0)
    yield from paths(problem)


def scaled_teacher(problem: Problem) -> FunctionRole:
    """The guided teacher's exact x_0, at the scale that it is told."""
    return FunctionRole(problem.schedule, lambda x, t,
                        cond: problem.teacher(x, t, problem.guided_cond(len(t), cond.w)).x0, problem.kind)


def _slope(problem: Problem, batch: Batch, step: Step, student: Affine) -> Tensor:
    """Of the mean of max(SNR, 1) |x_0 - aim|^2 / D: 2 max(SNR, 1) (x_0 - aim) / D, at the times of the sampler."""
    schedule = problem.schedule
    t = 1 - step.integers("step", STEPS).double() / STEPS
    x_t = schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
    aim = closed(problem, STEPS, problem.w)(x_t, t, batch.cond).x0
    weight = ((schedule.alpha(t) / schedule.sigma(t)) ** 2).clamp(min=1)
    slope = 2 * like(weight, x_t) * (student.m + x_t @ student.S.T - aim) / problem.dim
    return torch.cat([slope.mean(0), (slope[:, :, None] * x_t[:, None, :]).mean(0).flatten()]).detach()
