"""TDM: a student on the guided teacher's trajectory is at rest, and the critic that its states teach is that teacher;
the importance makes a critic of clean guesses unbiased."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.flow_map import secant_target
from ..methods.distribution.tdm import TDM, Settings
from .paths import elsewhere
from .paths_tdm import paths
from .players import OffsetRole
from .problem import Check, FunctionRole, Problem, off_law, off_zero
from .trajectory import start

COUNT, MANY, STEPS = 256, 5_000, 4


def made(problem: Problem, student: Role, critic: Role, steps: int = STEPS, **settings) -> TDM:
    chosen = Settings(**settings)
    roles = {"teacher": problem.teacher, "student": student, "critic": critic}
    return TDM(chosen, roles, problem.w, problem.sampler(TDM.inference(chosen, steps, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    yield from at_rest(problem)
    yield unbiased(problem)
    yield levels(problem)


def carried(problem: Problem, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Where the guided teacher's ODE carries x from t to r. At t = 1 a sampler has unit noise, which is not quite the
    law there: it is carried to the law at r."""
    (variances, axes), mean = problem.axes, problem.guided_cond(len(t), problem.w).text
    (a, s), (a_r, s_r) = ((problem.schedule.alpha(u)[:, None], problem.schedule.sigma(u)[:, None]) for u in (t, r))
    first = t[:, None] == 1
    offset = x - torch.where(first, 0.0, a) * mean
    spread = torch.where(first, 1.0, a**2 * variances + s**2)
    return a_r * mean + (offset @ axes * ((a_r**2 * variances + s_r**2) / spread).sqrt()) @ axes.T


def on_trajectory(problem: Problem, steps: int, off: Tensor) -> FunctionRole:
    """The student whose step from the end of a segment lands where the guided teacher's ODE does; `off` (D,) is added
    to its x_0."""
    def x0(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        t = torch.round(steps * t) / steps                        # samplers hold float32 times
        r = start(t, steps)
        return secant_target(x, carried(problem, x, t, r), t, r, problem.schedule) + off
    return FunctionRole(problem.schedule, x0, problem.kind)


def at_rest(problem: Problem) -> Iterator[Check]:
    """The states of `on_trajectory` have the guided teacher's laws."""
    off = torch.zeros(problem.dim, dtype=torch.float64, requires_grad=True)
    guided = problem.law(problem.covariance, problem.guided_cond(1, problem.w).text[0])
    student = on_trajectory(problem, STEPS, off)
    batch, pupil = problem.batch(MANY, data=False), OffsetRole(guided, MANY, problem.dim)
    step = problem.step(MANY, "critic")
    loss = made(problem, student, pupil, critic_target="state").critic_loss(batch, step)["denoising"]
    yield Check("slope of a critic of its states at the guided teacher, in standard errors",
                off_zero(pupil.slopes(loss)), 6)
    rest, usual = (torch.autograd.grad(made(problem, student, critic, critic_target="state").student_loss(
        batch, problem.step(MANY, kept=step.kept))["matching"], off)[0].norm() for critic in (guided, problem.teacher))
    yield Check("student's gradient there, over that with another critic", (rest / usual).item(), 1e-5)


def unbiased(problem: Problem) -> Check:
    """All laws of an affine student are normal: at each state of its way its x_0 has a mean and a covariance. Samples
    whose noise is mostly fresh have a weight of small variance."""
    student, schedule, one = problem.affine(), problem.schedule, torch.eye(problem.dim).double()
    (m, S), laws = (student.m.detach(), student.S.detach()), []
    mean, covariance = torch.zeros_like(m), one
    for i in range(STEPS):
        t, s = (torch.tensor([1 - n / STEPS], dtype=torch.float64) for n in (i, i + 1))
        laws.append(problem.law(S @ covariance @ S.T, m + S @ mean))
        kept = schedule.sigma(s) / schedule.sigma(t)
        share = schedule.alpha(s) - kept * schedule.alpha(t)
        A = share * S + kept * one
        mean, covariance = share * m + A @ mean, A @ covariance @ A.T

    def x0(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        each = torch.stack([law(x, t, cond).x0 for law in laws])
        return each[((1 - t) * STEPS).long(), torch.arange(len(t))]

    pupil, step = OffsetRole(FunctionRole(schedule, x0, problem.kind), MANY, problem.dim), problem.step(MANY, "critic")
    method, batch = made(problem, student, pupil, temperature=1.0), problem.batch(MANY, data=False)
    slopes = pupil.slopes(method.critic_loss(batch, step)["denoising"])
    *_, s, t = method.state(batch, step)
    return Check("slope of a critic under the exact importance at the denoiser of x_0's law, in standard errors",
                 off_zero(slopes[method.fresh(s, t) > 0.85]), 6)


def levels(problem: Problem) -> Check:
    """Of the noisiest segment."""
    student = FunctionRole(problem.schedule, lambda x, t, cond: x / 2)
    method, step = made(problem, student, problem.teacher), problem.step(MANY, "critic")
    batch = problem.batch(MANY, data=False)
    method.critic_loss(batch, step)
    *_, s, t = method.state(batch, step)
    law = torch.arange(760, 991, dtype=torch.float64) / 1000
    return Check("moments of the levels of the noisiest segment against a uniform law's, in standard errors",
                 off_law(t[s > 0.74], law), 6)
