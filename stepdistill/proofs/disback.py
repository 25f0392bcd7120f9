"""DisBack: at each stage of the way back the student is at rest where it draws as that stage's real score has it, and
recording teaches the critic the law of the initial student."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Role
from ..methods.distribution.disback import DisBack, Settings
from .paths import elsewhere
from .paths_disback import paths
from .players import OffsetRole, error, role_inputs
from .problem import Affine, Check, Problem, gradient, largest, stock_times

COUNT, MANY = 256, 5_000
SHORT = Settings(records=2, record_every=2, interval=3, record_guidance=1.0)
STAGES = {"record2": 6, "record1": 9, "teacher": 12}          # the first step of each


def made(problem: Problem, student: Role, critic: Role, settings: Settings = SHORT, **records: Role) -> DisBack:
    roles = {"teacher": problem.teacher, "student": student, "critic": critic, **records}
    return DisBack(settings, roles, problem.w, problem.sampler(DisBack.inference(settings, 1, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def drawing(problem: Problem, mean: Tensor, covariance: Tensor) -> Affine:
    """The student whose one-step samples have this law."""
    return Affine(problem.schedule, mean.clone().requires_grad_(), torch.linalg.cholesky(covariance).requires_grad_())


def closed_forms(problem: Problem) -> Iterator[Check]:
    yield from backwards(problem)
    student, batch = problem.affine(), problem.batch(MANY, data=False)
    exact, step = problem.law(*reversed(student.law)), problem.step(MANY, "critic")
    pupil, records = OffsetRole(exact, MANY, problem.dim), dict.fromkeys(SHORT.names, exact)
    method = made(problem, student, pupil, **records)
    loss = method.critic_loss(batch, step)["denoising"]
    x = student(step.normal("start", batch.shape), torch.ones(MANY), batch.cond).x0.detach()
    t = method.trained(step.uniform("t"))
    known = error(pupil, x, step.normal("noise", batch.shape), t, batch.cond, problem.kind).mean()
    yield from pupil.checks(loss, known)
    yield from role_inputs(problem, lambda student, critic: made(problem, student, critic, **records),
                           stock_times(*SHORT.t_range), stock_times())


def backwards(problem: Problem) -> Iterator[Check]:
    """Records are laws of their own, and the critic is exact for the student at hand."""
    laws = {name: (problem.normal(problem.dim), problem.drawn_covariance()) for name in SHORT.names}
    records = {name: problem.law(covariance, mean) for name, (mean, covariance) in laws.items()}
    laws["teacher"] = problem.guided_cond(1, problem.w).text[0], problem.covariance
    batch, rests, moved = problem.batch(COUNT, data=False), [], []
    for stage, first in STAGES.items():
        for name, (mean, covariance) in laws.items():
            student = drawing(problem, mean, covariance)
            method = made(problem, student, problem.law(covariance, mean), **records)
            losses = (method.student_loss(batch, problem.step(COUNT, index=i))["matching"] for i in (first, first + 2))
            (rests if name == stage else moved).append(max(gradient(loss, student).norm().item() for loss in losses))
    yield Check("largest gradient of a student that draws as its stage's real score says, over the least of one that "
                "draws as another's", largest(*rests) / min(moved), 1e-5)
