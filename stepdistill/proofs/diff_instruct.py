"""Diff-Instruct: the gradient is the difference of the exact scores, and vanishes at the teacher's own law."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ..diffusion.contracts import Role
from ..diffusion.guidance import drawn
from ..methods.distribution.diff_instruct import DiffInstruct, Settings
from .paths import elsewhere
from .paths_diff_instruct import paths
from .players import OffsetRole, error, role_inputs
from .problem import Affine, Check, Problem, difference, gradient, normal_values

COUNT, MANY = 256, 5_000


def made(problem: Problem, student: Affine, w: float, critic: Role | None = None) -> DiffInstruct:
    """With the critic that is exact for the student, unless another is given."""
    roles = {"teacher": problem.teacher, "student": student, "critic": critic or problem.law(*reversed(student.law))}
    return DiffInstruct(Settings(), roles, w, problem.sampler(DiffInstruct.inference(Settings(), 1, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    student = problem.affine()
    method, batch, step = made(problem, student, problem.w), problem.batch(COUNT, data=False), problem.step(COUNT)
    found = gradient(method.student_loss(batch, step)["matching"], student)

    z, t = step.normal("start", (problem.dim,)), method.level(step.uniform("t"))
    x = student(z, t, batch.cond).x0
    x_t = problem.schedule.add_noise(x.detach(), step.normal("noise", x.shape[1:]), t)
    guided = problem.guided_cond(COUNT, drawn(problem.w, step))
    apart = method.critic(x_t, t, batch.cond).x0 - problem.teacher(x_t, t, guided).x0
    known = gradient((apart.to(x) * x).mean(), student)
    yield Check("student's gradient against that of (fake - real) x, exact guided scores; relative",
                difference(found, known), 1e-5)

    mean, covariance = problem.guided_cond(1, problem.w).text[0], problem.covariance
    right = Affine(problem.schedule, mean.requires_grad_(), torch.linalg.cholesky(covariance).requires_grad_())
    rest = gradient(made(problem, right, problem.w).student_loss(batch, step)["matching"], right)
    yield Check("gradient where the student draws as the guided teacher, over its usual size",
                (rest.norm() / known.norm()).item(), 1e-5)

    pupil, batch, step = OffsetRole(method.critic, MANY,
                                    problem.dim), problem.batch(MANY, data=False), problem.step(MANY, "critic")
    loss = made(problem, student, problem.w, pupil).critic_loss(batch, step)["denoising"]
    x, t = student(step.normal("start", batch.shape), torch.ones(MANY),
                   batch.cond).x0.detach(), method.level(step.uniform("t"))
    weight = (problem.schedule.alpha(t) / problem.schedule.sigma(t)) ** 2 + 1
    yield from pupil.checks(loss, (weight * error(pupil, x, step.normal("noise", batch.shape), t,
                                                  batch.cond, "x0")).mean())
    levels = problem.schedule.time_at(normal_values(Settings().mean, Settings().std).exp().atan())
    levels = (1000 * levels).round().clamp(1, 1000) / 1000          # the nearest time that networks know
    yield from role_inputs(problem, lambda student, critic: made(problem, student, problem.w, critic), levels,
                           levels, shares=False)
