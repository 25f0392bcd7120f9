"""sCM: the gradient is that of the consistency function along the guided teacher's ODE, and vanishes at its flow
map."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.continuous import TRIG
from ..diffusion.contracts import Condition, Role
from ..diffusion.guidance import self_guided
from ..diffusion.schedule import like
from ..diffusion.views import viewed
from ..losses.tangent import RADIAN, trig_difference, trig_pair
from ..methods.consistency.scm import SCM, Settings
from .paths_scm import FIRST, last_trained, published_times
from .paths_scm import scm as paths
from .problem import Check, FunctionRole, Law, Problem, difference, gradient, largest, off_law

COUNT, MANY = 256, 20_000
TINY = 1e-4                       # radians to either side of a time


def made(problem: Problem, student: Role, w: float, **settings) -> SCM:
    chosen = Settings(**{"derivative": "exact", **settings})
    roles = {"teacher": problem.teacher, "student": student}
    return SCM(chosen, roles, w, problem.sampler(SCM.inference(chosen, 1, problem.schedule)))


def believer(problem: Problem, w: float, flows: bool) -> FunctionRole:
    """Believes in the end of the guided teacher's trajectory through x_t, or else, as that teacher does, in the mean of
    x_0."""
    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        law = problem.teacher.of(problem.guided_cond(len(t), w))
        return law.flow(x_t, t, torch.zeros_like(t)) if flows else law(x_t, t).x0
    return FunctionRole(problem.schedule, x0_of, problem.kind)


def identities(problem: Problem) -> Iterator[Check]:
    batch, begun, begins = problem.batch(COUNT), problem.step(COUNT, progress=0.5), problem.step(COUNT)
    flow, other = (made(problem, believer(problem, w, flows=True), problem.w) for w in (problem.w, problem.w - 1))
    least, usual = (method.loss(batch, begun)["consistency"].sqrt().item() for method in (flow, other))
    yield Check("tangent at the guided flow map, over that at the flow map of another scale", least / usual, 1e-9)

    teacher, other = (made(problem, believer(problem, w, flows=False), problem.w) for w in (problem.w, problem.w - 1))
    least, usual = (method.loss(batch, begins)["consistency"].sqrt().item() for method in (teacher, other))
    yield Check("at the first step, tangent at the guided teacher, over that at one of another scale",
                least / usual, 1e-9)

    yield from arbitrary(problem)
    yield from stages(problem)
    yield from at_the_defaults(problem)

    noise = problem.normal(COUNT, problem.dim)
    start = torch.full((COUNT,), flow.sampler.evaluations[0].level, dtype=torch.float64)
    ends = problem.teacher.of(problem.guided_cond(COUNT, problem.w)).flow(noise, start, 0 * start)
    landed = flow.sampler(believer(problem, problem.w, flows=True), noise, problem.cond(COUNT))
    yield Check("one step of the flow map against the guided teacher's ODE; relative", difference(landed, ends), 1e-5)
    yield from paths(problem)


def stages(problem: Problem) -> Iterator[Check]:
    """`guided {guidance_embedding: false}`, and then this method with that student as its teacher: its guidance lies
    within."""
    batch, begun = problem.batch(COUNT), problem.step(COUNT, progress=0.5)
    taught = self_guided(believer(problem, problem.w, flows=False), guidance_embedding=False)

    def tangent(w: float) -> float:
        roles = {"teacher": taught, "student": believer(problem, w, flows=True)}
        settings = Settings(derivative="exact")
        return SCM(settings, roles, problem.w,
                   problem.sampler(SCM.inference(settings, 1,
                                                 problem.schedule))).loss(batch, begun)["consistency"].sqrt().item()
    yield Check("tangent at the flow map of a teacher with its guidance within, over that at another scale's",
                tangent(problem.w) / tangent(problem.w - 1), 1e-9)


def at_the_defaults(problem: Problem) -> Iterator[Check]:
    """The widest that one-step samples can be off: where the default loss rests, the student follows its own recursion
    of differences.

    Marched up from the exact flow map at `FIRST`, for Gaussian data of deviation 0.2, 0.5 and 1, F(x) = c(theta) x.
    """
    worst = largest(*(abs(rest_width(problem, deviation, Settings()) - 1) for deviation in (0.2, 0.5, 1.0)))
    yield Check("width of one-step samples where the loss at the default derivative rests, from the data's; relative",
                worst, 0.01)


def rest_width(problem: Problem, deviation: float, settings: Settings, count: int = 500) -> float:
    """Of samples, over the data's: `count` noise levels up to where sampling begins."""
    ends = torch.tensor([FIRST, last_trained(problem)], dtype=torch.float64)
    angles = torch.linspace(*problem.schedule.angle(ends).tolist(), count, dtype=torch.float64)
    variance = angles.cos() ** 2 * deviation**2 + angles.sin() ** 2
    velocity = angles.sin() * angles.cos() * (1 - deviation**2) / variance
    known = ((angles.cos() - deviation / variance.sqrt()) / angles.sin())[:1]
    for i in range(1, count):
        low, high = (residual(torch.cat([known, torch.tensor([c], dtype=torch.float64)]), angles, velocity[i],
                              settings) for c in (0.0, 1.0))
        known = torch.cat([known, (low / (low - high)).reshape(1)])      # it is linear in the last coefficient
    return ((angles[-1].cos() - angles[-1].sin() * known[-1]) / (deviation / variance[-1].sqrt())).item()


def residual(known: Tensor, angles: Tensor, velocity: Tensor, settings: Settings) -> Tensor:
    """(velocity - F) cos - (x + slope) sin at x = 1 and the last of the angles that have a coefficient of F in `known`
    (n,)."""
    last, step = len(known) - 1, angles[1] - angles[0]

    def field(x: Tensor, t: Tensor) -> Tensor:
        place = (t / RADIAN - angles[0]) / step
        low = place.floor().long().clamp(0, last - 1)
        return (known[low] + (place - low) * (known[low + 1] - known[low]))[:, None].to(x) * x
    x, t = torch.ones(1, 1, dtype=torch.float64), (angles[last] * RADIAN).reshape(1)
    difference = {"pair": trig_pair, "difference": trig_difference}[settings.derivative]
    slope = difference(field, x, t, velocity * x, settings.width, (angles[0] * RADIAN).item())
    return (angles[last].cos() * (velocity - known[-1]) - angles[last].sin() * (1 + slope)).squeeze()


def arbitrary(problem: Problem) -> Iterator[Check]:
    """Of a student that is no teacher's: what it is told, and what pushes it, as it warms up and after."""
    batch, begun = problem.batch(COUNT), problem.step(COUNT, progress=0.5)
    student = problem.affine()
    method = made(problem, student, problem.w)
    t = method.consistency.times(begun.uniform("t"))
    x, seen = TRIG.add_noise(batch.x0, begun.normal("noise", batch.shape), t), viewed(student, TRIG)
    law = Law(TRIG, problem.covariance, "v").of(problem.guided_cond(COUNT, problem.w))
    after, before = (seen(law.flow(x, t, t + h * RADIAN), t + h * RADIAN, batch.cond).x0.detach()
                     for h in (TINY, -TINY))
    whole, v = like(TRIG.alpha(t), x) * (after - before) / (2 * TINY), seen(x, t, batch.cond).v.detach()
    at_first, worst = like(TRIG.alpha(t) ** 2, x) * (law(x, t).v - v), 0.0
    for share in (0.25, 0.75, 1.0, 2.0):
        r, moment = min(share, 1.0), problem.step(COUNT, progress=share * method.settings.warmup)
        g = r * whole + (1 - r) * at_first
        aim = g / (g.square().mean(1, keepdim=True).sqrt() + method.settings.damping)
        known = gradient((-2 * aim * seen(x, t, batch.cond).v).mean(), student)
        worst = largest(worst, difference(gradient(method.loss(batch, moment)["consistency"], student), known))
    yield Check("gradient of an arbitrary student, at four stages of the warm-up, against cos df/dtheta along the "
                "guided ODE; relative",
                worst, 1e-6)

    yield Check("moments of its times against those of ln tan theta ~ N(mean, std^2), in standard errors",
                off_law(method.consistency.times(problem.step(MANY).uniform("t")),
                        published_times(problem, method.settings)), 6)

    tame = problem.law(problem.drawn_covariance())
    slopes = [made(problem, tame, problem.w, derivative=by, width=TINY).consistency.slope(x, t, x, batch.cond)
              for by in ("difference", "exact")]
    yield Check(f"differences of width {TINY:g} against exact derivatives; relative", difference(*slopes), 1e-3)
