"""SCFlow: consistency on both sides rests at the ends of the guided teacher's trajectories, self-correction where all
ways are lines; the two agree where the teacher's ways are lines, and are apart by a known gap where they are curved."""
from __future__ import annotations

from collections.abc import Iterator
from math import log

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..methods.consistency.scflow import SCFlow, Settings
from .paths_scflow import paths
from .problem import Check, FunctionRole, Problem, difference, evenly, largest, off_law, stock_times

COUNT, MANY = 256, 5_000
NEAR = 0.01                                # a reach so short that a step of the teacher's is its trajectory


def made(problem: Problem, student: Role, w: float, steps: int = 1, **settings) -> SCFlow:
    heads = settings.pop("discriminator", None)
    chosen = Settings(**{"loss": "squared", "gan_weight": 0.1 if heads else 0.0, "warmup_updates": 0, **settings})
    roles = {"teacher": problem.teacher, "student": student, "target": student}
    sampler = problem.sampler(SCFlow.inference(chosen, steps, problem.schedule))
    return SCFlow(chosen, roles | ({"discriminator": heads} if heads else {}), w, sampler)


def ends(problem: Problem, w: float) -> FunctionRole:
    """The x_0 where the guided teacher's trajectory through x_t ends."""
    return FunctionRole(problem.schedule, lambda x, t, cond: problem.flow(x, t, 0 * t, w), "x0")


def lines(problem: Problem) -> FunctionRole:
    """A student of a flow whose every way from noise e is the line to m + A e."""
    A, m, eye = (torch.linalg.cholesky(problem.drawn_covariance()), problem.normal(problem.dim),
                 torch.eye(problem.dim).double())

    def x0_of(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        a, s = (c(t)[:, None, None] for c in (problem.schedule.alpha, problem.schedule.sigma))
        return m + torch.linalg.solve(a * A + s * eye, (x - a[:, 0] * m)[..., None])[..., 0] @ A.T
    return FunctionRole(problem.schedule, x0_of, "x0")


def roots(method: SCFlow, problem: Problem) -> dict[str, float]:
    losses = method.student_loss(problem.batch(COUNT), problem.step(COUNT))
    return {name: value.item() ** 0.5 for name, value in losses.items()}


def beside(problem: Problem, student: Role) -> SCFlow:
    """Away from the data, where one step is no trajectory, and the data are the target."""
    method, inner = made(problem, student, 1.0), evenly(0.2, 0.95, COUNT)
    method.times = lambda step: (inner, inner - NEAR * step.uniform("low"), inner + NEAR * step.uniform("high"))
    return method


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    far, near = (roots(beside(problem, ends(problem, w)), problem) for w in (2.0, 1.0))
    for name, side in (("consistency", "below"), ("high", "above")):
        yield Check(f"distance from the neighbour {side} at the ends of the teacher's trajectories, over that at "
                    "another scale's",
                    near[name] / far[name], 0.02)
    yield from corrected(problem)
    yield from game(problem)
    t, low, high = made(problem, problem.teacher, 1.0, reach=0.2).times(problem.step(MANY))
    inner = (t > 0.2) & (t < 0.8)
    yield Check("moments of t, and of its neighbours within reach, against uniform laws, in standard errors",
                largest(off_law(t, stock_times()), off_law((t - low)[inner], evenly(0, 0.2)),
                        off_law((high - t)[inner], evenly(0, 0.2))), 6)


def corrected(problem: Problem) -> Iterator[Check]:
    batch, step = problem.batch(COUNT), problem.step(COUNT)
    e, one = step.normal("start", batch.shape), torch.ones(COUNT, dtype=torch.float64)
    method = made(problem, ends(problem, 1.0), 1.0, self_weight=1.0)
    t, z_1 = method.times(step)[0], problem.flow(e.double(), one, 0 * one, 1.0)
    line = problem.schedule.add_noise(z_1, e.double(), t)
    variances, axes = problem.axes
    spread = (problem.schedule.alpha(t)[:, None] ** 2 * variances + problem.schedule.sigma(t)[:, None] ** 2).sqrt()
    mean = batch.cond.text
    again = mean + ((line - problem.schedule.alpha(t)[:, None] * mean) @ axes * variances.sqrt() / spread) @ axes.T
    found, gap = method.student_loss(batch, step)["self"], (again - z_1).square().mean()
    yield Check("self-correction at the ends of curved trajectories against the known gap; relative",
                difference(found, gap), 1e-5)
    if problem.name == "flow":
        student, noise = lines(problem), problem.normal(COUNT, problem.dim)
        apart = made(problem, student, 1.0, self_weight=1.0).student_loss(batch, step)["self"]
        yield Check("self-correction where all ways are lines, over the known gap", (apart / gap).item(), 1e-9)
        few, at_once = (made(problem, student, 1.0, steps).sampler(student, noise, batch.cond) for steps in (4, 1))
        yield Check("there, a sample in 4 steps against that in one; relative", difference(few, at_once), 1e-6)


def game(problem: Problem) -> Iterator[Check]:
    """What the heads are shown, and what it is worth where they cannot tell."""
    batch, step, shown = problem.batch(COUNT), problem.step(COUNT), []
    heads = lambda x, t, cond: shown.append((x.detach(), t)) or 0 * x[:, :2]
    student = ends(problem, 1.0)
    method = made(problem, student, 1.0, discriminator=heads)
    losses = method.student_loss(batch, step)
    losses |= method.critic_loss(batch, problem.step(COUNT, "discriminator", kept=step.kept))
    blind = max(abs(losses["gan"].item() - 0.1 * log(2)), abs(losses["discriminator"].item() - 2 * log(2)))
    yield Check("losses where the heads cannot tell, from 0.1 log 2 and 2 log 2", blind, 1e-6)
    (_, judged), (real, t), (fake, again) = shown
    one = torch.ones(COUNT, dtype=torch.float64)
    z_1 = problem.flow(step.normal("start", batch.shape).double(), one, 0 * one, 1.0)
    kept = problem.schedule.alpha(t)[:, None]
    yield Check("real - fake that the heads are shown, under one noise, from data - z_1; relative",
                difference(real - fake, kept * (batch.x0 - z_1)), 1e-5)
    low = method.times(step)[1].clamp(min=1 / 1000)
    yield Check("times at which they judge, from the neighbour below",
                largest(*((each - low).abs().max().item() for each in (judged, t, again))), 1e-12)
