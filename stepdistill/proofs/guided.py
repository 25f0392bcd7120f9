"""Guided distillation: the one student that is guided as the teacher is at every scale that it is told has no loss."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Batch, Role
from ..diffusion.draws import Step
from ..diffusion.guidance import drawn
from ..diffusion.schedule import like
from ..diffusion.times import LEVELS
from ..methods.base import Guidance
from ..methods.trajectory.guided import GuidedDistillation, Settings
from .paths_trajectory import guided as paths
from .problem import Affine, Check, FunctionRole, Problem, difference, evenly, gradient, off_law, reaching, stock_times

COUNT, STEPS = 512, 8


def made(problem: Problem, student: Role, w: Guidance, teacher: Role | None = None,
         **settings: Any) -> GuidedDistillation:
    chosen = Settings(**settings)
    sampler = problem.sampler(GuidedDistillation.inference(chosen, STEPS, problem.schedule))
    return GuidedDistillation(chosen, {"teacher": teacher or problem.teacher, "student": student}, w, sampler)


def closed(problem: Problem, off: float = 0.0) -> FunctionRole:
    """Guided, in closed form, at the scale that it is told, `off` too much."""
    return FunctionRole(problem.schedule, lambda x, t,
                        cond: problem.teacher(x, t, problem.guided_cond(len(t), cond.w + off)).x0, problem.kind)


def identities(problem: Problem) -> Iterator[Check]:
    batch, step, spread = problem.batch(COUNT), problem.step(COUNT), (1.0, problem.w)
    loss = lambda student, w, **settings: made(problem, student, w, **settings).loss(batch, step)["guided"]
    usual, right = loss(closed(problem, 1.0), spread), closed(problem)
    rest = loss(right, spread) / usual
    yield Check("loss of the guided teacher at every scale of a range, over that of one a scale too high",
                rest.item(), 1e-18)
    ((_, t, cond),) = right.calls
    for name, found, law in (("scales it was told", cond.w, evenly(*spread)),
                             ("times it was asked at", t, stock_times())):
        yield Check(f"moments of the {name} against the uniform law's, in standard errors", off_law(found, law), 6)

    plain, fixed = (FunctionRole(problem.schedule, lambda x, t, cond,
                                 w=w: problem.teacher(x, t, problem.guided_cond(len(t), w)).x0, problem.kind)
                    for w in (1.0, problem.w))
    for w in (1.0, (1.0, 1.0)):
        yield Check(f"loss of the conditional teacher at w = {w}, over that of one a scale too high",
                    (loss(plain, w) / usual).item(), 1e-18)
    rest = loss(fixed, problem.w, guidance_embedding=False) / usual
    yield Check("loss of the guided teacher where nothing is told, over the same", rest.item(), 1e-18)

    for weight in ("truncated", "v"):
        student = problem.affine()
        found = gradient(loss(student, spread, weight=weight), student)
        known = _slope(problem, weight, batch, step, student)
        yield Check(f"gradient under weight {weight} against that of the weighted error in x_0; relative",
                    difference(found, known), 1e-9)

    teacher = problem.affine()
    yield Check("gradient that reaches the teacher", reaching(loss(problem.affine(), spread, teacher=teacher), teacher),
                0)
    yield from paths(problem)


def _slope(problem: Problem, weight: str, batch: Batch, step: Step, student: Affine) -> Tensor:
    """Of the mean of weight |x_0 - aim|^2 / D: 2 weight (x_0 - aim) / D, with the aim in closed form."""
    schedule = problem.schedule
    t, w = ((step.uniform("t") * LEVELS).floor() + 1) / LEVELS, drawn((1.0, problem.w), step)
    x_t = schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
    aim = problem.teacher(x_t, t, problem.guided_cond(COUNT, w)).x0
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    factor = snr.clamp(min=1) if weight == "truncated" else snr + 1
    slope = 2 * like(factor, x_t) * (student.m + x_t @ student.S.T - aim) / problem.dim
    return torch.cat([slope.mean(0), (slope[:, :, None] * x_t[:, None, :]).mean(0).flatten()]).detach()
