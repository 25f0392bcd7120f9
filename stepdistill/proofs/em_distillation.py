"""EM Distillation: a chain of one step is DMD's, none moves a student that draws as its teacher, and the chain's mean
of linear laws is what they say."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Role
from ..methods.distribution.dmd2 import DMD2
from ..methods.distribution.dmd2 import Settings as SettingsOfDMD2
from ..methods.hybrid.em_distillation import EMDistillation, Settings
from .paths import elsewhere
from .paths_em_distillation import paths
from .players import OffsetRole, error, role_inputs
from .problem import Affine, Check, Problem, difference, gradient, largest, off_zero, stock_times

COUNT, MANY = 256, 5_000


def made(problem: Problem, student: Role, critic: Role, **settings: float) -> EMDistillation:
    roles, chosen = {"teacher": problem.teacher, "student": student, "critic": critic}, Settings(**settings)
    return EMDistillation(chosen, roles, problem.w,
                          problem.sampler(EMDistillation.inference(chosen, 1, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    student, batch, step = problem.affine(), problem.batch(COUNT), problem.step(COUNT)
    critic, plain = problem.law(*reversed(student.law)), SettingsOfDMD2(gan_weight=0)
    dmd2 = DMD2(plain, {"teacher": problem.teacher, "student": student, "critic": critic}, problem.w,
                problem.sampler(DMD2.inference(plain, 1, problem.schedule)))
    known = gradient(dmd2.student_loss(batch, step)["matching"], student)
    found = gradient(made(problem, student, critic, langevin_steps=1, latent_rate=0.0).student_loss(batch,
                                                                                                    step)["matching"],
                     student)
    yield Check("gradient after one step, z at rest, against DMD2's; relative", difference(found, known), 1e-6)

    mean, covariance = problem.guided_cond(1, problem.w).text[0], problem.covariance
    right = Affine(problem.schedule, mean.requires_grad_(), torch.linalg.cholesky(covariance).requires_grad_())
    law = problem.law(covariance, mean.detach())
    rest = gradient(made(problem, right, law).student_loss(batch, step)["matching"], right)
    usual = gradient(made(problem, student, critic).student_loss(batch, step)["matching"], student)
    yield Check("gradient where the student draws as the guided teacher, over its usual size",
                (rest.norm() / usual.norm()).item(), 1e-5)
    yield from chains(problem, student)
    pupil, many = OffsetRole(critic, MANY, problem.dim), problem.batch(MANY)
    method, moment = made(problem, student, pupil), problem.step(MANY, "critic")
    x = student(moment.normal("start", many.shape), torch.ones(MANY), many.cond).x0.detach()
    t = method.trained(moment.uniform("t"))
    off = error(pupil, x, moment.normal("noise", many.shape), t, many.cond, problem.kind).mean()
    yield from pupil.checks(method.critic_loss(many, moment)["denoising"], off)
    levels = stock_times(*Settings().t_range)
    yield from role_inputs(problem, lambda student, critic: made(problem, student, critic, langevin_steps=1), levels,
                           stock_times(), 1, shares=False)


def chains(problem: Problem, student: Affine) -> Iterator[Check]:
    """Of a student and a teacher that are Gaussian, everything in a chain is linear: the mean of z and of what is left
    of eps follow a recursion, with A the matrix of real - fake in x_t."""
    settings = {"langevin_steps": 5, "noise_rate": 0.3, "latent_rate": 0.05}
    method = made(problem, student, problem.law(*reversed(student.law)), **settings)
    t = problem.times(1, 0.3, 0.7).expand(MANY)
    z, left, _ = method.chain(problem.batch(MANY), problem.step(MANY), t)
    (alpha, sigma), (m, S) = ((c(t[:1]).item() for c in (problem.schedule.alpha, problem.schedule.sigma)),
                              (student.m.detach(), student.S.detach()))
    mean, g, u = problem.guided_cond(1, problem.w).text[0], 0.3, 0.05
    at, eps, drift = torch.zeros(problem.dim).double(), torch.zeros(problem.dim).double(), 0.0
    for _ in range(5):
        x_t = alpha * (m + S @ at) + sigma * eps
        apart = denoised(problem, x_t, mean, problem.covariance, alpha, sigma) - denoised(problem, x_t, m, S @ S.T,
                                                                                          alpha, sigma)
        drift = (1 - g) * drift + g * apart
        eps = (1 - g) * eps + g * alpha / sigma * apart
        at = (1 - u) * at + u * (alpha / sigma) ** 2 * S.T @ apart
    drift = drift / (1 - (1 - g) ** 5)
    yield Check("mean of z and of the drifts after a chain against their recursion, in standard errors",
                largest(off_zero(z.double() - at), off_zero(left - drift)), 6)


def denoised(problem: Problem, x_t: Tensor, mean: Tensor, covariance: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x_0 | x_t] of N(mean, covariance), (D,)."""
    one = torch.eye(problem.dim, dtype=torch.float64)
    return mean + alpha * covariance @ torch.linalg.solve(alpha**2 * covariance + sigma**2 * one, x_t - alpha * mean)
