"""LADD: the equilibrium of the hinge game, gradients through heads that are linear, and quadratic heads at the data's
own law."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..diffusion.schedule import like
from ..methods.adversarial.ladd import LADD, Settings
from .paths import elsewhere
from .paths_ladd import paths
from .problem import (
    Check,
    FunctionRole,
    Problem,
    difference,
    gradient,
    largest,
    moments,
    normal_values,
    off_law,
    off_zero,
)

COUNT, FEW, MANY, STEPS = 256, 5_000, 40_000, 4


def made(problem: Problem, student, discriminator, **settings) -> LADD:
    roles = {"teacher": problem.teacher, "student": student, "discriminator": discriminator}
    return LADD(Settings(**{"warmup_updates": 0, **settings}), roles, problem.w,
                problem.sampler(LADD.inference(Settings(), STEPS, problem.schedule)))


def exact(problem: Problem) -> FunctionRole:
    """The student that draws the data's law from data noised to any time, and from pure noise."""
    one, root = torch.ones(1, dtype=torch.float64), torch.linalg.cholesky(problem.covariance)

    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        law = problem.teacher.of(cond)
        return torch.where(like(t, x_t) < one, law.flow(x_t, t, torch.zeros_like(t)), law.mean + x_t @ root.T)

    return FunctionRole(problem.schedule, x0_of)


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    yield from game(problem)
    yield from law(problem)
    yield from times(problem)


def game(problem: Problem) -> Iterator[Check]:
    """On few samples, to the last digit."""
    affine, heads = problem.affine(), 0.1 * problem.normal(2, problem.dim)
    student = FunctionRole(problem.schedule, lambda x_t, t, cond: like(1 + t, x_t) * affine(x_t, t, cond).x0)
    batch, step = problem.batch(COUNT), problem.step(COUNT)

    blind = made(problem, student, lambda x, t, cond: [0 * x[:, :2]])
    losses = blind.student_loss(batch, step), blind.critic_loss(batch, step)
    off = largest(abs(losses[0]["gan"].item()), abs(losses[1]["discriminator"].item() - 2))
    yield Check("losses where the heads cannot tell, from 0 and 2", off, 1e-9)

    method = made(problem, student, lambda x, t, cond: [x @ heads.T])
    t = method.law(step.uniform("t"))
    noise = step.normal("start", (problem.dim,))
    x_t = torch.where(t[:, None] == 1, noise, problem.schedule.add_noise(batch.x0, noise, t))
    alpha = problem.schedule.alpha(method.level(step.uniform("fake s")))
    found = gradient(method.student_loss(batch, step)["gan"], affine)
    slope = -((1 + t) * alpha)[:, None] * heads.mean(0) / COUNT
    known = torch.cat([slope.sum(0), (slope.T @ x_t).flatten()])
    yield Check("student's gradient against -alpha_s w, through x_0 = (1 + t) (m + S x_t); relative",
                difference(found, known), 1e-5)

    theta = torch.zeros(2, problem.dim, dtype=torch.float64, requires_grad=True)
    method = made(problem, student, lambda x, s, cond: [(like(1 + s, x) * cond.text * x) @ theta.T])
    method.student_loss(batch, step)
    critic = problem.step(COUNT, "discriminator", kept=step.kept)
    found, = torch.autograd.grad(method.critic_loss(batch, critic)["discriminator"], theta)
    real, fake = (noised(problem, method, x, critic, name)
                  for x, name in ((batch.x0, "real"), (step.kept["sample"], "fake")))
    known = (batch.cond.text * (fake - real)).mean(0).expand(2, -1) / 2
    yield Check("heads' slope at logit 0 against fake - real, as they see it; relative", difference(found, known), 1e-5)


def noised(problem: Problem, method: LADD, x: Tensor, step, name: str) -> Tensor:
    """What heads are shown of x, times 1 + s."""
    s = method.level(step.uniform(f"{name} s"))
    return like(1 + s, x) * problem.schedule.add_noise(x, step.normal(f"{name} noise", x.shape[1:]), s)


def law(problem: Problem) -> Iterator[Check]:
    """On many: heads that see mean and covariance."""
    found = apart(problem, exact(problem))
    yield Check("slope of quadratic heads where the student draws the data's law, in standard errors", found, 6)
    found = apart(problem, problem.teacher, shares=(1.0, 0.0, 0.0, 0.0), mean=-1.0)
    yield Check("6 standard errors over their slope, at low noise, where it draws the mean alone", 6 / found, 1)


def times(problem: Problem) -> Iterator[Check]:
    """What student and heads are told, at the last step that warms up and at the first that does not."""
    batch, grid, found, s = problem.batch(FEW), 1 - torch.arange(4).double() / 4, [], Settings()
    for index, shares, label in ((6, s.warmup_shares, "while it warms up"), (7, s.shares, "once it has")):
        student = FunctionRole(problem.schedule, lambda x, t, cond: x)
        method = made(problem, student, lambda x, t, cond: found.append(t) or [x[:, :1]], warmup_updates=7)
        step = problem.step(FEW, index=index)
        method.student_loss(batch, step)
        method.critic_loss(batch, problem.step(FEW, "discriminator", index=index, kept=step.kept))
        yield Check(f"moments of its times {label} against the shares', in standard errors",
                    off_law(student.calls[0][1], grid, torch.tensor(shares, dtype=torch.float64)), 6)
    sigma = normal_values(s.mean, s.std).sigmoid()
    levels = problem.schedule.time_at(torch.atan2(sigma, 1 - sigma))
    yield Check("moments of the levels judged against those of logit s ~ N(mean, std^2), in standard errors",
                largest(*(off_law(each, levels) for each in found)), 6)


def apart(problem: Problem, student, **settings) -> float:
    """How far quadratic heads at logit 0 are from rest, in standard errors."""
    seen: list[Tensor] = []
    method = made(problem, student, lambda x, t, cond: seen.append(moments(x)) or [0 * x[:, :1]], **settings)
    batch, step = problem.batch(MANY), problem.step(MANY)
    method.student_loss(batch, step)
    method.critic_loss(batch, problem.step(MANY, "discriminator", kept=step.kept))
    _, real, fake = seen
    return off_zero(fake - real)
