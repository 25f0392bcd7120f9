"""KD: no loss where the student's steps land on the guided teacher's way, however many; the mean where the noise is
lost."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Pairs, Role
from ..diffusion.exact import GaussianMixture
from ..diffusion.flow_map import secant_target, toward
from ..diffusion.schedule import like
from ..methods.trajectory.kd import KD, Settings
from .paths_trajectory import kd as paths
from .problem import Affine, Check, FunctionRole, Problem, difference, gradient, standard_errors

COUNT, MANY = 256, 20_000


def made(problem: Problem, student: Role, steps: int) -> KD:
    sampler = problem.sampler(KD.inference(Settings(), steps, problem.schedule))
    return KD(Settings(), {"teacher": problem.teacher, "student": student}, problem.w, sampler)


def traveller(problem: Problem, steps: int, w: float) -> FunctionRole:
    """The student whose every step lands where the teacher's way, guided at w, is then."""
    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        r = ((t * steps).round() - 1) / steps
        return secant_target(x_t, problem.flow(x_t, t, r, w), t, r, problem.schedule)
    return FunctionRole(problem.schedule, x0_of, problem.kind)


def identities(problem: Problem) -> Iterator[Check]:
    t, r = problem.times(2 * COUNT).chunk(2)
    x_t = problem.normal(COUNT, problem.dim)
    x_r = problem.flow(x_t, t, r, problem.w)
    landed = toward(secant_target(x_t, x_r, t, r, problem.schedule), x_t, t, r, problem.schedule)
    yield Check("one step from the secant target against where the teacher's way is then; relative",
                difference(landed, x_r), 1e-9)

    for steps in (1, 4):
        batch, step = problem.paired(COUNT, nodes=4, w=problem.w), problem.step(COUNT)
        student, other = traveller(problem, steps, problem.w), traveller(problem, steps, 1.0)
        rest, usual = (made(problem, role, steps).loss(batch, step)["regression"] for role in (student, other))
        yield Check(f"{steps}-step loss at the guided flow map, over that at the unguided one",
                    (rest / usual).item(), 1e-18)
        drawn = made(problem, student, steps).sampler(student, batch.pairs.noise, batch.cond)
        yield Check(f"its sample in {steps} steps against the picture; relative", difference(drawn, batch.x0), 1e-9)

    student = problem.affine()
    found = gradient(made(problem, student, 4).loss(batch, step)["regression"], student)
    yield Check("gradient against that of the step's own regression, 4 steps; relative",
                difference(found, _slope(problem, batch.pairs, student)), 1e-9)
    yield _mixture(problem)
    yield _mixed_up(problem)
    yield from paths(problem)


def _slope(problem: Problem, pairs: Pairs, student: Affine) -> Tensor:
    """x_r = c x_0 + q x_t, with q = sigma_r / sigma_t and c = alpha_r - q alpha_t, so the slope in x_0 is 2 c (x_r -
    node) / D."""
    s, j = problem.schedule, problem.step(COUNT).integers("leg", 4)
    rows, states = torch.arange(COUNT), torch.cat([pairs.noise[:, None], pairs.nodes], 1)
    x_t, node, t, r = states[rows, j], states[rows, j + 1], 1 - j / 4, 1 - (j + 1) / 4
    q = s.sigma(r) / s.sigma(t)
    c = s.alpha(r) - q * s.alpha(t)
    x0 = student.m + x_t @ student.S.T
    slope = like(2 * c, x_t) * (like(c, x_t) * x0 + like(q, x_t) * x_t - node) / problem.dim
    return torch.cat([slope.mean(0), (slope[:, :, None] * x_t[:, None, :]).mean(0).flatten()]).detach()


def _mixture(problem: Problem) -> Check:
    """In one dimension the way of a mixture, which no straight map follows, is closed too."""
    numbers = lambda low, high: torch.tensor([problem.uniform(low, high) for _ in range(3)], dtype=torch.float64)
    data = GaussianMixture.of(problem.schedule, numbers(0.5, 1), numbers(-2, 2)[:, None], numbers(0.1, 0.4))
    noise, start = problem.normal(COUNT, 1), torch.ones(COUNT, dtype=torch.float64)
    picture = data.flow(noise, start, 0 * start)
    student = FunctionRole(problem.schedule, lambda x, t, cond: data.flow(x, t, 0 * t), problem.kind)
    batch = replace(problem.paired(COUNT), x0=picture,
                    pairs=Pairs(noise, picture[:, None], torch.zeros(COUNT, 1, dtype=torch.float64)))
    loss = made(problem, student, 1).loss(batch, problem.step(COUNT))["regression"]
    return Check("loss at a mixture's exact flow map, over the variance of the pictures",
                 (loss / picture.var()).item(), 1e-12)


def _mixed_up(problem: Problem) -> Check:
    """Without the noise that a picture came from, the best guess of it is the mean of all, which the mean noise leads
    to."""
    batch, start = problem.paired(MANY), torch.ones(1, dtype=torch.float64)
    mean = problem.flow(torch.zeros(1, problem.dim, dtype=torch.float64), start, 0 * start, 1.0)
    pairs = replace(batch.pairs, noise=problem.normal(MANY, problem.dim))
    each = Affine(problem.schedule, mean.repeat(MANY, 1).requires_grad_(), torch.zeros(problem.dim, problem.dim))
    loss = made(problem, each, 1).loss(replace(batch, pairs=pairs), problem.step(MANY))["regression"]
    slope = MANY * torch.autograd.grad(loss, each.m)[0]
    return Check("pairs mixed up: slope at the mean picture, in standard errors",
                 standard_errors(slope, pairs.noise), 6)
