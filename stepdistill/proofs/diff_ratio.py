"""DiffRatio: with the exact log ratio of the densities the step is the difference of the scores, weighed by every
divergence as its own f has it, and that ratio is where the classifier rests."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.schedule import like
from ..losses.divergence import DIVERGENCES
from ..methods.distribution.diff_ratio import DiffRatio, Settings
from .f_distill import curvature
from .paths import elsewhere
from .paths_diff_ratio import paths
from .players import role_inputs, simulated
from .problem import Affine, Check, Problem, difference, gradient, largest, off_zero, stock_times
from .smd import log_ratio

COUNT, MANY, STEPS = 256, 5_000, 4
Logits = Callable[[Tensor, Tensor, Condition], Tensor]


def made(problem: Problem, student: Role, logits: Logits, steps: int = 1, **settings) -> DiffRatio:
    chosen = Settings(**settings)
    return DiffRatio(chosen, {"student": student, "discriminator": logits}, problem.w,
                     problem.sampler(DiffRatio.inference(chosen, steps, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    student = problem.affine()
    yield from moved(problem, student)
    yield from separation(problem, student)
    yield from role_inputs(problem, lambda student, critic: made(problem, student, lambda x_t, t, cond:
                                                                 critic(x_t, t, cond).x0[:, :1], STEPS),
                           stock_times(*Settings().t_range), stock_times(), STEPS, shares=False)


def moved(problem: Problem, student: Affine) -> Iterator[Check]:
    """By the classifier's own gradient, against what two exact denoisers say."""
    batch, schedule, fake = problem.batch(COUNT), problem.schedule, problem.law(*reversed(student.law))
    exact = lambda x_t, t, cond: log_ratio(problem, student, x_t, t, cond)[:, None]

    def off(pull: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], **settings) -> float:
        """pull: of alpha, sigma, the ratio, and the difference of the x_0, the student's less the data's."""
        step, method = problem.step(COUNT), made(problem, student, exact, **settings)
        found = gradient(method.student_loss(batch, step)["log_ratio"], student)
        z, _, _ = simulated(student, method.sampler, step)
        x, t = student(z, torch.ones(COUNT), batch.cond).x0, method.moved(step.uniform("t"))
        x_t = schedule.add_noise(x.detach(), step.normal("noise", batch.shape).to(x), t)
        r = log_ratio(problem, student, x_t, t, batch.cond).clamp(-10, 10).exp().clamp(0.1, 20)
        apart = fake(x_t, t, batch.cond).x0 - problem.teacher(x_t, t, batch.cond).x0
        alpha, sigma = (like(c, x) for c in (schedule.alpha(t), schedule.sigma(t)))
        weighed = pull(alpha, sigma, r[:, None], apart)
        return difference(found, gradient((weighed * x).sum(1).mean(), student))

    by_weight = {"score": lambda a, s, r, d: (a / s) ** 2 * d, "eps": lambda a, s, r, d: a / s * d,
                 "x0": lambda a, s, r, d: d}
    yield Check("gradient against the difference of exact scores times alpha, of noises, of x_0; relative",
                largest(*(off(pull, weight=name) for name, pull in by_weight.items())), 1e-5)

    def bent(f: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda a, s, r, d: r**2 * curvature(f, r) / curvature(f, torch.ones(1)) * d
    yield Check("gradient of every divergence against r^2 f''(r) times the difference of the x_0; relative",
                largest(*(off(bent(f), weight="x0", divergence=name) for name, (f, *_) in DIVERGENCES.items())), 1e-5)


def separation(problem: Problem, student: Affine) -> Iterator[Check]:
    """Slopes of an affine of x_t that is added to the log ratio, and to another."""
    batch, step = problem.batch(MANY), problem.step(MANY, "critic+discriminator")

    def slope(away: float) -> float:
        moved = torch.zeros(MANY, 1 + problem.dim, dtype=torch.float64, requires_grad=True)
        logits = lambda x_t, t, cond: (log_ratio(problem, student, x_t, t, cond) + away + moved[:, 0]
                                       + (moved[:, 1:] * x_t.double()).sum(1))[:, None]
        loss = made(problem, student, logits).critic_loss(batch, step)["discriminator"]
        return off_zero(torch.autograd.grad(loss, moved)[0])
    yield Check("what telling apart teaches the log ratio of the densities, in standard errors", slope(0.0), 6)
    yield Check("6 standard errors over what it teaches a log ratio that is off by 1", 6 / slope(1.0), 1)
