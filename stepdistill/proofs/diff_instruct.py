"""Diff-Instruct: the gradient is the difference of the exact scores, and vanishes at the teacher's own law."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ..diffusion.guidance import drawn
from ..diffusion.schedule import like
from ..diffusion.weighting import edm
from ..methods.distribution.diff_instruct import DiffInstruct, Settings
from .problem import Affine, Check, Problem, difference, gradient, standard_errors

COUNT, MANY = 256, 20_000


def made(problem: Problem, student: Affine, w: float) -> DiffInstruct:
    """With the critic that is exact for the student, whose condition names the student's mean."""
    _, covariance = student.law
    roles = {"teacher": problem.teacher, "student": student, "critic": problem.law(covariance, mean=student.m.detach())}
    return DiffInstruct(Settings(), roles, w, problem.sampler(DiffInstruct.inference(Settings(), 1, problem.name)))


def identities(problem: Problem) -> Iterator[Check]:
    student = problem.affine()
    method, batch, step = made(problem, student, problem.w), problem.batch(COUNT, data=False), problem.step(COUNT)
    found = gradient(method.student_loss(batch, step)["matching"], student)

    z, t = step.normal("start", (problem.dim,)), method.level(step.uniform("t"))
    x = student(z, t, batch.cond).x0
    x_t = problem.schedule.add_noise(x.detach(), step.normal("noise", x.shape[1:]), t)
    guided = problem.guided_cond(COUNT, drawn(problem.w, step))
    apart = method.critic(x_t, t, batch.cond).x0 - problem.teacher(x_t, t, guided).x0
    known = gradient((apart.to(x) * x).mean(), student)
    yield Check("student's gradient against that of (fake - real) x, exact guided scores; relative", difference(found, known), 1e-5)

    mean, covariance = problem.guided_cond(1, problem.w).text[0], problem.covariance
    right = Affine(problem.schedule, mean.requires_grad_(), torch.linalg.cholesky(covariance).requires_grad_())
    rest = gradient(made(problem, right, problem.w).student_loss(batch, step)["matching"], right)
    yield Check("gradient where the student draws as the guided teacher, over its usual size", (rest.norm() / known.norm()).item(), 1e-5)

    batch, step = problem.batch(MANY, data=False), problem.step(MANY, "critic")
    x = student(step.normal("start", (problem.dim,)), torch.ones(MANY), batch.cond).x0.detach()
    t = method.level(step.uniform("t"))
    x_t = problem.schedule.add_noise(x, step.normal("noise", x.shape[1:]), t)
    slope = like(edm(problem.schedule, t, 1.0), x) * (method.critic(x_t, t, batch.cond).x0 - x)
    yield Check("slope of the critic's loss at the exact denoiser, in standard errors", standard_errors(slope, x_t), 6)
