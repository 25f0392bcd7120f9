"""TRACT: the fixed point is the teacher's own DDIM steps to the segment's end, guided as the teacher is, and it samples
so."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Batch, Condition, Role
from ..diffusion.draws import Step
from ..diffusion.flow_map import secant_target, toward
from ..diffusion.guidance import guided
from ..diffusion.schedule import like
from ..diffusion.solvers import ddim
from ..methods.trajectory.tract import TRACT, Settings
from .followers import following
from .paths_trajectory import tract as paths
from .problem import Affine, Check, FunctionRole, Problem, difference, gradient

COUNT, NODES = 256, 40


def made(problem: Problem, steps: int, student: Role, target: Role) -> TRACT:
    roles = {"teacher": problem.teacher, "student": student, "target": target}
    return TRACT(Settings(nodes=NODES), roles, problem.w,
                 problem.sampler(TRACT.inference(Settings(nodes=NODES), steps, problem.schedule)))


def gains(problem: Problem) -> Tensor:
    """What the teacher's DDIM steps from node i to 0 leave of x - alpha m along the axes of the data: (NODES + 1, D).
    One step leaves (alpha_r alpha_t C + sigma_r sigma_t) / (alpha_t^2 C + sigma_t^2)."""
    t, variances = torch.arange(NODES + 1).double() / NODES, torch.linalg.eigvalsh(problem.covariance)
    alpha, sigma = problem.schedule.alpha(t)[:, None], problem.schedule.sigma(t)[:, None]
    each = (alpha[:-1] * alpha[1:] * variances + sigma[:-1] * sigma[1:]) / (alpha[1:] ** 2 * variances + sigma[1:] ** 2)
    return torch.cat([torch.ones(1, problem.dim, dtype=torch.float64), each]).cumprod(0)


def closed(problem: Problem, steps: int, w: float) -> FunctionRole:
    """The student whose one step from any node goes the teacher's steps, guided at w, to the end of the segment."""
    schedule, axes, left = problem.schedule, torch.linalg.eigh(problem.covariance).eigenvectors, gains(problem)

    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        i, m = (t * NODES).round().long(), problem.guided_cond(len(t), w).text
        end = (i - 1) * steps // NODES * (NODES // steps)
        r = end.double() / NODES
        off = (x_t.double() - like(schedule.alpha(t), m) * m) @ axes
        x_r = like(schedule.alpha(r), m) * m + (off * left[i] / left[end]) @ axes.T
        return secant_target(x_t, x_r, t, r, schedule)
    return FunctionRole(schedule, x0_of, problem.kind)


def identities(problem: Problem) -> Iterator[Check]:
    batch, step, noise = problem.batch(COUNT), problem.step(COUNT), problem.normal(COUNT, problem.dim)
    times = torch.linspace(1, 0, NODES + 1, dtype=torch.float64)
    far = ddim(guided(problem.teacher, problem.w), noise, times, batch.cond)
    for steps in (1, 4):
        student, other = closed(problem, steps, problem.w), closed(problem, steps, 1.0)
        rest, usual = (made(problem, steps, role, role).loss(batch, step)["closure"] for role in (student, other))
        yield Check(f"{steps}-step loss at the guided teacher's own steps, over that at the unguided's",
                    (rest / usual).item(), 1e-18)
        drawn = made(problem, steps, student, student).sampler(student, noise, batch.cond)
        yield Check(f"its sample in {steps} steps against the teacher's in {NODES}; relative",
                    difference(drawn, far), 1e-9)

    for label, student, target in (("teacher and target reach", problem.affine(), problem.affine()),
                                   ("it reaches itself", one := problem.affine(), one)):
        found = gradient(made(problem, 4, student, target).loss(batch, step)["closure"], student)
        known = _slope(problem, batch, step, student, target)
        yield Check(f"gradient against that of the regression on where {label}; relative",
                    difference(found, known), 1e-9)
    yield from paths(problem)
    yield from following("tract", problem)


def _slope(problem: Problem, batch: Batch, step: Step, student: Affine, target: Affine) -> Tensor:
    """Of max(SNR, 1) |x_0 - aim|^2 / D with 4 steps: 2 max(SNR, 1) (x_0 - aim) / D, where the aim is held fixed."""
    schedule, segment = problem.schedule, NODES // 4
    i = step.integers("node", NODES) + 1
    end = (i - 1) // segment * segment
    t, s, r = (each.double() / NODES for each in (i, i - 1, end))
    x_t = schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
    x_s = toward(problem.teacher(x_t, t, problem.guided_cond(COUNT, problem.w)).x0, x_t, t, s, schedule)
    inside = i - 1 > end
    x_r = x_s.clone()
    x_r[inside] = toward(target.m + x_s[inside] @ target.S.T, x_s[inside], s[inside], r[inside], schedule)
    aim = secant_target(x_t, x_r, t, r, schedule)
    weight = torch.maximum((schedule.alpha(t) / schedule.sigma(t)) ** 2, torch.ones_like(t))
    slope = 2 * like(weight, x_t) * (student.m + x_t @ student.S.T - aim) / problem.dim
    return torch.cat([slope.mean(0), (slope[:, :, None] * x_t[:, None, :]).mean(0).flatten()]).detach()
