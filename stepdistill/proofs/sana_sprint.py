"""SANA-Sprint: its tangent vanishes at the flow map of the scale that the student reads, and its heads at the data's
law."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.continuous import start
from ..diffusion.contracts import Condition, Role
from ..methods.hybrid.sana_sprint import SanaSprint, Settings
from .paths import elsewhere
from .paths_sana_sprint import paths
from .paths_scm import published_times
from .problem import Check, FunctionRole, Problem, largest, moments, normal_values, off_law, off_zero

COUNT, MANY = 256, 20_000
RANGE = (1.5, 4.0)


def made(problem: Problem, student: Role, discriminator, guidance=RANGE, **settings) -> SanaSprint:
    chosen = Settings(**{"derivative": "exact", **settings})
    roles = {"teacher": problem.teacher, "student": student, "discriminator": discriminator}
    return SanaSprint(chosen, roles, guidance, problem.sampler(SanaSprint.inference(chosen, 1, problem.schedule)))


def reader(problem: Problem, more: float = 0.0) -> FunctionRole:
    """Believes in the end of the trajectory of the teacher guided at the scale that it reads, and `more`."""
    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        law = problem.teacher.of(problem.guided_cond(len(t), cond.w + more))
        return law.flow(x_t, t, torch.zeros_like(t))
    return FunctionRole(problem.schedule, x0_of, problem.kind)


def blind(x: Tensor, s: Tensor, cond: Condition) -> list[Tensor]:
    return [0 * x[:, :2]]


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    batch, begun = problem.batch(COUNT), problem.step(COUNT, progress=0.5)
    least, usual = (made(problem, reader(problem, more), blind).student_loss(batch, begun)["consistency"].sqrt().item()
                    for more in (0.0, 0.5))
    yield Check("tangent at the flow map of each sample's scale, over that at scales 0.5 higher", least / usual, 1e-9)
    method, step = made(problem, reader(problem), blind), problem.step(COUNT)
    fooled = method.student_loss(batch, step)["gan"].item()
    told = method.critic_loss(batch, problem.step(COUNT, "discriminator", kept=step.kept))["discriminator"].item()
    yield Check("losses where the heads cannot tell, from 0 and 2", largest(abs(fooled), abs(told - 2)), 1e-9)
    yield from drawn(problem)
    yield from law(problem)


def drawn(problem: Problem) -> Iterator[Check]:
    """When the heads are asked, and how the samples that they judge begin."""
    levels, student = [], reader(problem)
    method = made(problem, student, lambda x, s, cond: levels.append(s) or blind(x, s, cond), derivative="difference")
    batch, step, first = problem.batch(MANY), problem.step(MANY), start(problem.schedule)
    method.student_loss(batch, step)
    method.critic_loss(batch, problem.step(MANY, "discriminator", kept=step.kept))
    x, t, _ = student.calls[-1]
    pure = step.uniform("pure") < method.settings.noise_share
    share = (pure.double().mean() - 0.5).abs() / (0.25 / MANY) ** 0.5
    yield Check("share of what the heads judge that begins in pure noise, from a half, in standard errors",
                share.item(), 6)
    yield Check("its times from that where sampling begins", (t[pure] - first).abs().max().item(), 1e-9)
    noise = step.normal("start", batch.shape).double()[pure]
    rescale = (1 - first) ** 2 + first**2 if problem.name == "flow" else 1.0         # of the circle's states
    yield Check("its states from unit noise, relative",
                ((x[pure] - rescale**0.5 * noise).abs().max() / noise.abs().max()).item(), 1e-6)
    own = problem.schedule.time_at(published_times(problem, method.settings) * torch.pi / 2)
    yield Check("moments of the times of the others, in standard errors", off_law(t[~pure], own), 6)
    law = problem.schedule.time_at(normal_values(Settings().judged_mean, Settings().judged_std).exp().atan())
    yield Check("moments of the levels judged against those of their law, in standard errors",
                largest(*(off_law(each, law) for each in levels)), 6)


def law(problem: Problem) -> Iterator[Check]:
    """Heads that see mean and covariance, where every sample has the law of the data, and where it has its mean
    alone."""
    found, usual = (apart(problem, student) for student in (data_law(problem), problem.teacher))
    yield Check("slope of quadratic heads where the student draws the data's law, in standard errors", found, 6)
    yield Check("6 standard errors over their slope, where it draws the mean of what is noised", 6 / usual, 1)


def data_law(problem: Problem) -> FunctionRole:
    """Draws the data's law, of pure noise where sampling begins and of noised data below."""
    root, first = torch.linalg.cholesky(problem.covariance), start(problem.schedule)

    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        law = problem.teacher.of(cond)
        rescale = ((1 - first) ** 2 + first**2) ** 0.5 if problem.name == "flow" else 1.0
        pure = (t - first).abs() < 1e-9
        return torch.where(pure[:, None], law.mean + x_t @ root.T / rescale, law.flow(x_t, t, torch.zeros_like(t)))
    return FunctionRole(problem.schedule, x0_of, problem.kind)


def apart(problem: Problem, student: Role) -> float:
    """How far quadratic heads at logit 0 are from rest, in standard errors."""
    shown: list[Tensor] = []
    method = made(problem, student, lambda x, s, cond: shown.append(moments(x)) or [0 * x[:, :1]], 1.0,
                  derivative="difference", guidance_embedding=False, judged_mean=-1.0)
    batch, step = problem.batch(MANY), problem.step(MANY)
    method.student_loss(batch, step)
    method.critic_loss(batch, problem.step(MANY, "discriminator", kept=step.kept))
    _, real, fake = shown
    return off_zero(fake - real)
