"""SMD: at a share of 1 it is DMD's step; the heads rest at the ratio of the densities, and SMT's critic at the
mixtures' denoiser."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.schedule import like
from ..methods.distribution.dmd2 import DMD2
from ..methods.distribution.dmd2 import Settings as SettingsOfDMD2
from ..methods.distribution.smd import SMD, Settings
from .paths import elsewhere
from .paths_smd import paths
from .players import OffsetRole, exits, role_inputs
from .problem import (
    Affine,
    Check,
    FunctionRole,
    Problem,
    difference,
    evenly,
    gradient,
    largest,
    off_law,
    off_zero,
    stock_times,
)

COUNT, MANY, STEPS = 256, 5_000, 4
PLAIN, DATA = Settings(gan_weight=0), Settings(source="data")


def made(problem: Problem, student: Role, critic: Role, logits: Callable[[Tensor, Tensor], Tensor] | None = None,
         settings: Settings = PLAIN, steps: int = 1) -> SMD:
    roles: dict[str, Any] = {"student": student, "critic": critic}
    roles |= {"teacher": problem.teacher, "discriminator": lambda x_t, t, cond: logits(x_t, t)} if logits else {}
    return SMD(settings, roles, problem.w, problem.sampler(SMD.inference(settings, steps, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    student, batch, towards = problem.affine(), problem.batch(COUNT), problem.normal(problem.dim)
    critic, plain = problem.law(*reversed(student.law)), SettingsOfDMD2(gan_weight=0)
    logits = lambda x_t, t: 0.3 * (x_t.double() @ towards)[:, None]
    dmd2 = DMD2(plain, {"teacher": problem.teacher, "student": student, "critic": critic}, problem.w,
                problem.sampler(DMD2.inference(plain, STEPS, problem.schedule)))
    whole = made(problem, student, critic, logits, replace(PLAIN, shares=(1.0, 1.0)), STEPS)
    pairs = [[gradient(method.student_loss(batch, step)["matching"], student) for method in (whole, dmd2)]
             for step in exits(problem, COUNT, STEPS)]
    yield Check("gradient at a share of 1 against DMD2's, at each exit; relative",
                largest(*(difference(*pair) for pair in pairs)), 1e-12)
    yield from heads(problem, student)
    yield from mixtures(problem, student)
    yield from shares(problem, student)
    yield from role_inputs(problem, lambda student, critic: made(problem, student, critic, logits, Settings(), STEPS),
                           stock_times(*Settings().t_range), stock_times(), STEPS, shares=False)


def log_ratio(problem: Problem, student: Affine, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Of the densities of noised data and noised samples, (B,)."""
    mean, covariance = student.law
    x_t, fake = x_t.double(), problem.law(covariance, mean)
    return problem.teacher.of(cond).log_density(x_t, t) - fake.of(cond).log_density(x_t, t)


def heads(problem: Problem, student: Affine) -> Iterator[Check]:
    """Slopes of an affine of x_t that is added to the log ratio, and to another."""
    batch, step = problem.batch(MANY), problem.step(MANY, "critic")
    critic = problem.law(*reversed(student.law))

    def slope(away: float) -> float:
        moved = torch.zeros(MANY, 1 + problem.dim, dtype=torch.float64, requires_grad=True)
        logits = lambda x_t, t: (log_ratio(problem, student, x_t, t, batch.cond) + away + moved[:, 0]
                                 + (moved[:, 1:] * x_t.double()).sum(1))[:, None]
        losses = made(problem, student, critic, logits).critic_loss(batch, step)
        return off_zero(torch.autograd.grad(losses["mixture"], moved)[0])
    yield Check("what regressing mixtures teaches the log ratio of the densities, in standard errors", slope(0.0), 6)
    yield Check("6 standard errors over what it teaches a log ratio that is off by 1", 6 / slope(1.0), 1)


def mixtures(problem: Problem, student: Affine) -> Iterator[Check]:
    """SMT: D_a E[x | x_t] of data + (1 - D_a) E[x | x_t] of samples is what a critic that reads a rests at; and by
    which the student moves as by the difference of the scores."""
    batch, step, fake = problem.batch(MANY), problem.step(MANY, "critic"), problem.law(*reversed(student.law))

    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        plain = Condition(text=problem.means[0].expand(len(t), -1))
        D = torch.sigmoid(log_ratio(problem, student, x_t, t, plain) + cond.extra["share"].logit())[:, None]
        return D * problem.teacher(x_t, t, plain).x0 + (1 - D) * fake(x_t, t, plain).x0
    mixed = FunctionRole(problem.schedule, x0_of, problem.kind)
    pupil = OffsetRole(mixed, MANY, problem.dim)
    loss = made(problem, student, pupil, settings=DATA).mixed_loss(batch, step)["denoising"]
    yield Check("what mixtures teach their exact denoiser, in standard errors", off_zero(pupil.slopes(loss)), 6)

    few, moment = problem.batch(COUNT), problem.step(COUNT)
    found = gradient(made(problem, student, mixed, settings=DATA).learned_loss(few, moment)["matching"], student)
    z = moment.normal("start", few.shape)
    method, x = made(problem, student, mixed, settings=DATA), student(z, torch.ones(COUNT), few.cond).x0
    t = method.matched(moment.uniform("t"))
    x_t = problem.schedule.add_noise(x.detach(), moment.normal("noise", few.shape).to(x), t)
    real, mine = problem.teacher(x_t, t, few.cond).x0, fake(x_t, t, few.cond).x0
    a = DATA.shares[0] + (DATA.shares[1] - DATA.shares[0]) * moment.uniform("share")
    D = like(torch.sigmoid(log_ratio(problem, student, x_t, t, few.cond) + a.logit()), x)
    size = (mine - real).square().mean(1, keepdim=True)
    pull = D * (mine - real) * ((size + 1e-6) / (D**2 * size + 1e-6)).sqrt() / (x.detach()
                                                                                - real).abs().mean(1, keepdim=True)
    yield Check("SMT's gradient with that denoiser against the difference of the scores, of its size at 1; relative",
                difference(found, gradient((pull * x).mean(), student)), 1e-4)


def shares(problem: Problem, student: Affine) -> Iterator[Check]:
    """Of SMT's critic: a quarter at 0, the others uniform."""
    read = FunctionRole(problem.schedule, lambda x_t, t, cond: 0 * x_t, "x0")
    batch, step = problem.batch(MANY), problem.step(MANY, "critic")
    made(problem, student, read, settings=DATA).mixed_loss(batch, step)
    found = read.calls[0][2].extra["share"]
    law = torch.cat([torch.zeros(2_500, dtype=torch.float64), evenly(0, 1, 7_500)])
    yield Check("moments of the shares that the critic reads, in standard errors", off_law(found, law), 6)
