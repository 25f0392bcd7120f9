"""SnapFusion: teacher and student are guided alike, at every scale of a range; a student of the exact answers has no
loss, guided or not, and its pipeline's guidance leads where the teacher's two steps do."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..diffusion.contracts import Role
from ..diffusion.guidance import guided
from ..diffusion.solvers import ddim
from ..methods.base import Guidance
from ..methods.trajectory.snapfusion import Settings, SnapFusion
from .paths_trajectory import snapfusion as paths
from .problem import Check, FunctionRole, Problem, difference, reaching
from .progressive import closed, grid_of, two_steps

COUNT, STEPS = 256, 4


def made(problem: Problem, teacher: Role, student: Role, steps: int = STEPS, w: Guidance | None = None,
         **settings: Any) -> SnapFusion:
    chosen = Settings(**{"guided_share": 1.0, "denoising_weight": 0.0} | settings)
    sampler = problem.sampler(SnapFusion.inference(chosen, steps, problem.schedule))
    return SnapFusion(chosen, {"teacher": teacher, "student": student}, problem.w if w is None else w, sampler)


def answering(problem: Problem, steps: int) -> FunctionRole:
    """The student whose one step is two of the unguided teacher's, for each prompt and for none."""
    return two_steps(problem, steps, lambda cond, count: cond.text)


def identities(problem: Problem) -> Iterator[Check]:
    batch, step, noise = problem.batch(COUNT), problem.step(COUNT), problem.normal(COUNT, problem.dim)
    plain, other = answering(problem, STEPS), closed(problem, STEPS, 1.0)
    usual = made(problem, problem.teacher, other).loss(batch, step)["distillation"]
    for name, share, w in (("guided at one scale", 1.0, problem.w), ("guided at each of a range", 1.0, (1.0, 9.0)),
                           ("never guided", 0.0, problem.w)):
        rest = made(problem, problem.teacher, plain, w=w, guided_share=share).loss(batch, step)["distillation"]
        yield Check(f"loss at the unguided teacher's two steps, {name}, over that of a student with one answer",
                    (rest / usual).item(), 1e-18)
    for steps in (1, STEPS):
        method = made(problem, problem.teacher, student := answering(problem, steps), steps)
        drawn = method.sampler(guided(student, problem.w), noise, batch.cond)
        far = ddim(guided(problem.teacher, problem.w), noise, grid_of(problem, steps), batch.cond)
        yield Check(f"its guided sample in {steps} steps against the guided teacher's in {2 * steps}; relative",
                    difference(drawn, far), 1e-9)
    yield shifted(problem)
    teacher, student = problem.affine(), problem.affine()
    loss = made(problem, teacher, student).loss(batch, step)["distillation"]
    yield Check("gradient that reaches the teacher", reaching(loss, teacher), 0)
    yield from paths(problem)


def shifted(problem: Problem) -> Check:
    """With guidance in every step the mix alone is known: what is added to the answers to the prompt and to none as
    w - 1 is to w leaves the loss as it is."""
    batch, step, w = problem.batch(COUNT), problem.step(COUNT), problem.w
    plain, apart, prompt = answering(problem, STEPS), problem.normal(problem.dim), problem.means[0]

    def x0_of(x_t, t, cond):
        told = (cond.text == prompt).all(1)[:, None].double()
        return plain(x_t, t, cond).x0 + (w - told) * apart
    role = FunctionRole(problem.schedule, x0_of, problem.kind)
    rest, usual = (made(problem, problem.teacher, role, guided_share=share).loss(batch, step)["distillation"]
                   for share in (1.0, 0.0))
    return Check("loss at one scale of a student whose two answers are shifted as w - 1 to w, over that unguided",
                 (rest / usual).item(), 1e-18)
