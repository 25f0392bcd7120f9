"""rCM: both of its losses rest where the student is the flow map of the guided teacher, whatever the length of a
rollout."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.continuous import TRIG, start
from ..diffusion.contracts import Condition, Role
from ..diffusion.draws import Step
from ..methods.hybrid.rcm import RCM, Settings
from .paths import elsewhere
from .paths_rcm import paths
from .players import OffsetRole, error
from .problem import (
    Affine,
    Check,
    FunctionRole,
    Problem,
    difference,
    evenly,
    gradient,
    largest,
    moments,
    off_law,
    off_zero,
)

COUNT, MANY = 256, 5_000


def made(problem: Problem, student: Role, critic: Role, **settings) -> RCM:
    chosen = Settings(**{"derivative": "exact", "warmup": 0.0, **settings})
    roles = {"teacher": problem.teacher, "student": student, "critic": critic}
    return RCM(chosen, roles, problem.w, problem.sampler(RCM.inference(chosen, 1, problem.schedule)))


def mean(problem: Problem) -> Tensor:
    """Of the guided teacher's data, (D,)."""
    return problem.guided_cond(1, problem.w).text[0]


def flow_map(problem: Problem, by: Affine | None = None) -> FunctionRole:
    """The end of the guided teacher's trajectory; by: added to what it says, as a function of x_t."""
    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        end = problem.teacher.of(problem.guided_cond(len(t), problem.w)).flow(x_t, t, torch.zeros_like(t))
        return end if by is None else end + by(x_t, t, cond).x0
    return FunctionRole(problem.schedule, x0_of, problem.kind)


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    yield from rest(problem)
    yield from matched(problem)
    yield from rollouts(problem)
    student = problem.affine()
    norm, batch, step = on_the_circle(problem), problem.batch(MANY), problem.step(MANY, "critic")
    pupil = OffsetRole(problem.law(norm**2 * student.law[1], student.law[0]), MANY, problem.dim)
    method = made(problem, student, pupil, rollout_steps=1)
    x = student(norm * step.normal("start", batch.shape).double(), torch.ones(MANY), batch.cond).x0.detach()
    t = problem.schedule.time_at(TRIG.angle(method.level(step.uniform("t"))))
    off = error(pupil, x, step.normal("noise", batch.shape), t, batch.cond, "x0")
    yield from pupil.checks(method.critic_loss(batch, step)["denoising"],
                            (off / problem.schedule.angle(t).sin() ** 2).mean())


def on_the_circle(problem: Problem) -> float:
    """What unit noise as a state of TrigFlow is as one of the problem's own schedule, where sampling begins."""
    first = torch.tensor([start(problem.schedule)], dtype=torch.float64)
    return torch.hypot(problem.schedule.alpha(first), problem.schedule.sigma(first)).item()


def rest(problem: Problem) -> Iterator[Check]:
    """With the critic of the guided law."""
    batch, law = problem.batch(COUNT), problem.law(problem.covariance, mean(problem))
    tangents, slopes = [], []
    for away in (0.0, 0.1):                  # a constant alone would leave no tangent, but a slope of the matching
        by = Affine(problem.schedule, torch.full((problem.dim,), away).double().requires_grad_(),
                    (away * torch.eye(problem.dim)).double().requires_grad_())
        critic = problem.law(problem.covariance, mean(problem) + away)
        method = made(problem, flow_map(problem, by), law if not away else critic)
        found = [method.student_loss(batch, step) for step in rolls(problem)]
        tangents.append(largest(*(losses["consistency"].sqrt().item() for losses in found)))
        slopes.append(largest(*(gradient(losses["matching"], by).norm().item() for losses in found)))
    yield Check("tangent at the guided flow map, over that of one that adds 0.1 + 0.1 x_t",
                tangents[0] / tangents[1], 1e-9)
    yield Check("gradient of the matching there, after rollouts of 1 to 4 steps, over that beside",
                slopes[0] / slopes[1], 1e-4)


def rolls(problem: Problem, count: int = COUNT) -> list[Step]:
    """A moment for each length of a rollout, from 1 to 4."""
    found, index = {}, 0
    while len(found) < 4:
        step = problem.step(count, index=index, progress=0.5)
        found.setdefault(int(step.shared("steps") * 4), step)
        index += 1
    return [found[length] for length in range(4)]


def matched(problem: Problem) -> Iterator[Check]:
    """Of an affine student, after one evaluation: (fake - real) x / |x - real|, times sqrt(D) / 50."""
    student, batch, step = problem.affine(), problem.batch(COUNT), problem.step(COUNT, progress=0.5)
    critic = problem.law(*reversed(student.law))
    method = made(problem, student, critic, rollout_steps=1)
    found = gradient(method.student_loss(batch, step)["matching"], student)
    x = student(on_the_circle(problem) * step.normal("start", batch.shape).double(), torch.ones(COUNT), batch.cond).x0
    t = problem.schedule.time_at(TRIG.angle(method.level(step.uniform("matched t"))))
    x_t = problem.schedule.add_noise(x.detach(), step.normal("matched noise", batch.shape).double(), t)
    real = problem.teacher(x_t, t, problem.guided_cond(COUNT, problem.w)).x0
    pull = (critic(x_t, t, batch.cond).x0 - real) / (x.detach() - real).abs().mean(1, keepdim=True)
    known = gradient(problem.dim**0.5 / 50 * (pull * x).mean(), student)
    yield Check("matching of an affine student against the difference of the exact scores; relative",
                difference(found, known), 1e-5)


def rollouts(problem: Problem) -> Iterator[Check]:
    """Of the flow map: what is drawn has the guided law after any number of steps, at descending times."""
    student, batch = flow_map(problem), problem.batch(MANY)
    method, first = made(problem, student, problem.teacher), start(problem.schedule)
    law = problem.teacher.of(problem.guided_cond(MANY, problem.w))
    exact = moments(law.mean + problem.normal(MANY, problem.dim) @ torch.linalg.cholesky(problem.covariance).T)
    rising, begun, drawn, off = 0.0, 0.0, [], 0.0
    for step in rolls(problem, MANY):
        student.calls.clear()
        x = method.rolled(batch, step).double()
        times = [t for _, t, _ in student.calls]
        begun = largest(begun, (times[0] - first).abs().max().item())
        rising = largest(rising, *((after - before).max().item() for before, after in zip(times, times[1:])))
        drawn += times[1:2]
        if loud(problem):                      # else unit noise is not quite the law of the first state
            off = largest(off, off_zero(moments(x) - exact))
    yield Check("its first time from that where sampling begins", begun, 1e-9)
    yield Check("by how much a later time is above one before", rising, 1e-9)
    u = evenly(0, 1)
    sigma = 5 * u / (1 + 4 * u)
    ends = problem.schedule.angle(torch.tensor([1 / 1000, first], dtype=torch.float64)).tolist()
    known = problem.schedule.time_at(torch.atan2(sigma, 1 - sigma).clamp(*ends))
    yield Check("moments of its second times, in standard errors", largest(*(off_law(t, known) for t in drawn)), 6)
    yield Check("moments of the samples of a flow map, in standard errors", off, 6)


def loud(problem: Problem) -> bool:
    """Whether the first state holds next to nothing of the data."""
    return problem.schedule.angle(torch.tensor([start(problem.schedule)], dtype=torch.float64)).tan().item() > 500
