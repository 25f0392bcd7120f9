"""SwiftBrush: teacher and critic are guided alike, so that it is the unguided teacher that the student comes to draw
as."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ..diffusion.contracts import Role
from ..diffusion.schedule import like
from ..methods.distribution.swiftbrush import Settings, SwiftBrush
from .paths import elsewhere
from .paths_swiftbrush import paths
from .players import OffsetRole, error, role_inputs, simulated
from .problem import Affine, Check, FunctionRole, Problem, difference, gradient, off_zero, stock_times

COUNT, MANY = 256, 5_000


def made(problem: Problem, student: Role, critic: Role, w: float) -> SwiftBrush:
    roles = {"teacher": problem.teacher, "student": student, "critic": critic}
    return SwiftBrush(Settings(), roles, w, problem.sampler(SwiftBrush.inference(Settings(), 1, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    student, critic = problem.affine(), problem.law(problem.drawn_covariance())
    method, batch, step = (made(problem, student, critic, problem.w), problem.batch(COUNT, data=False),
                           problem.step(COUNT))
    found = gradient(method.student_loss(batch, step)["matching"], student)

    z, t = simulated(student, method.sampler, step)[0], method.matched(step.uniform("t"))
    x = student(z, t, batch.cond).x0
    x_t = problem.schedule.add_noise(x.detach(), step.normal("noise", batch.shape).double(), t)
    guided = problem.guided_cond(COUNT, problem.w)
    apart = like(problem.schedule.sigma(t) ** 2, x) * (problem.teacher(x_t, t, guided).eps - critic(x_t, t, guided).eps)
    known = gradient((apart * x).mean(), student)
    yield Check("student's gradient against that of sigma^2 (real - fake) x, exact guided eps; relative",
                difference(found, known), 1e-5)

    rest = gradient(made(problem, student, problem.teacher, 3 * problem.w).student_loss(batch, step)["matching"],
                    student)
    yield Check("gradient once the critic is the teacher, given the prompt and without, over its usual size",
                (rest.norm() / known.norm()).item(), 1e-5)
    yield from fitted(problem)
    yield from role_inputs(problem, lambda student, critic: made(problem, student, critic, problem.w),
                           stock_times(*Settings().t_range),
                     stock_times(), drop=Settings().drop)


def fitted(problem: Problem) -> Iterator[Check]:
    """The critic of a student that draws N(text, C): exact, and not shown some of the prompts."""
    batch, step = problem.batch(MANY, data=False), problem.step(MANY, "critic")
    own = Affine(problem.schedule, torch.zeros(problem.dim), torch.linalg.cholesky(problem.covariance))
    student = FunctionRole(problem.schedule, lambda x_t, t, cond: cond.text + own(x_t, t, cond).x0)
    # The sample is made for the prompt, and the critic that is not shown it learns the law of such samples: where
    # nothing but one prompt is asked for, that is N(text, C) too.
    critic = FunctionRole(problem.schedule, lambda x_t, t, cond: problem.teacher(x_t, t, problem.cond(len(t))).x0,
                          problem.kind)
    pupil = OffsetRole(critic, MANY, problem.dim)
    method = made(problem, student, pupil, problem.w)
    method.student_loss(batch, step)
    loss = method.critic_loss(batch, step)["denoising"]
    missed = (critic.calls[-1][2].text == problem.means[1]).all(1).double()
    x, t = (student(step.normal("start", batch.shape), torch.ones(MANY), batch.cond).x0,
            method.trained(step.uniform("t")))
    known = problem.schedule.alpha(t) ** 2 * error(pupil, x, step.normal("noise", batch.shape), t, batch.cond, "eps")
    yield from pupil.checks(loss, known.mean())
    yield Check("share of prompts that the critic misses against that in the settings, in standard errors",
                off_zero(missed[:, None] - method.settings.drop), 6)
