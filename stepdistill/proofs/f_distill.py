"""f-distill: with a discriminator at its optimum the step is the gradient of the divergence between noised laws; of the
reverse KL it is DMD2's to the last bit."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.schedule import like
from ..losses.divergence import DIVERGENCES
from ..methods.distribution.dmd2 import DMD2
from ..methods.distribution.dmd2 import Settings as SettingsOfDMD2
from ..methods.distribution.f_distill import FDistill, Settings
from .paths import elsewhere
from .paths_f_distill import paths
from .players import role_inputs, simulated
from .problem import Affine, Check, Problem, difference, gradient, largest, off_zero, stock_times

COUNT, MANY, STEPS = 256, 5_000, 4
PLAIN = Settings(gan_weight=0)
Logits = Callable[[Tensor, Tensor], Tensor]


def made(problem: Problem, student: Affine, critic, w: float, logits: Logits, settings: Settings = PLAIN,
         steps: int = 1) -> FDistill:
    roles = {"teacher": problem.teacher, "student": student, "critic": critic,
             "discriminator": lambda x_t, t, cond: logits(x_t, t)}
    return FDistill(settings, roles, w, problem.sampler(FDistill.inference(settings, steps, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    student, batch, w, step = problem.affine(), problem.batch(COUNT), problem.w, problem.step(COUNT)
    critic = problem.law(*reversed(student.law))
    towards = problem.normal(problem.dim)
    logits = lambda x_t, t: 0.3 * (x_t.double() @ towards)[:, None]
    plain = DMD2(SettingsOfDMD2(gan_weight=0), {"teacher": problem.teacher, "student": student, "critic": critic}, w,
                 problem.sampler(DMD2.inference(SettingsOfDMD2(gan_weight=0), STEPS, problem.schedule)))
    reverse = made(problem, student, critic, w, logits, replace(PLAIN, divergence="reverse_kl"), STEPS)
    yield Check("gradient of the reverse KL against DMD2's; relative",
                difference(gradient(reverse.student_loss(batch, step)["matching"], student),
                           gradient(plain.student_loss(batch, problem.step(COUNT))["matching"], student)), 1e-12)
    yield from weighted(problem, student, logits)
    yield from separation(problem, student)
    yield from role_inputs(problem, lambda student, critic: made(problem, student, critic, w, logits,
                                                                 Settings(), STEPS),
                           stock_times(*Settings().t_range), stock_times(), STEPS, shares=False)


def weighted(problem: Problem, student: Affine, logits: Logits) -> Iterator[Check]:
    """Of every divergence: DMD2's pull of a sample times h(r) / h(1), with h from its own f by two derivatives, r^2
    f''(r)."""
    batch, w, worst = problem.batch(COUNT), problem.w, 0.0
    critic = problem.law(*reversed(student.law))
    for name, (f, *_) in DIVERGENCES.items():
        step = problem.step(COUNT)
        method = made(problem, student, critic, w, logits, replace(PLAIN, divergence=name))
        found = gradient(method.student_loss(batch, step)["matching"], student)
        z, _, _ = simulated(student, method.sampler, step)
        x = student(z, torch.ones(COUNT), batch.cond).x0
        t = method.matched(step.uniform("t"))
        x_t = problem.schedule.add_noise(x.detach(), step.normal("noise", batch.shape).to(x), t)
        real = problem.teacher(x_t, t, problem.guided_cond(COUNT, w)).x0
        r = logits(x_t, t)[:, 0].clamp(-10, 10).exp().clamp(0.1, 20)
        h = r**2 * curvature(f, r) / curvature(f, torch.ones(1))
        pull = like(h, x) * (critic(x_t, t, batch.cond).x0 - real)
        known = gradient((pull / (x.detach() - real).abs().mean(1, keepdim=True) * x).mean(), student)
        worst = largest(worst, difference(found, known))
    yield Check("gradient of every divergence against r^2 f''(r) times the difference of the scores; relative",
                worst, 1e-5)


def curvature(f: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """f''(r)."""
    with torch.enable_grad():
        r = r.detach().double().requires_grad_()
        slope = torch.autograd.grad(f(r).sum(), r, create_graph=True)[0]
        return torch.autograd.grad(slope.sum(), r)[0]


def separation(problem: Problem, student: Affine) -> Iterator[Check]:
    """At the log ratio of the noised densities the discriminator rests: slopes of an affine of x_t that is added to
    it."""
    batch, step = problem.batch(MANY), problem.step(MANY, "critic")
    mean, covariance = student.law
    fake = problem.law(covariance, mean)
    moved = torch.zeros(MANY, 1 + problem.dim, dtype=torch.float64, requires_grad=True)

    def ratio(x_t: Tensor, t: Tensor) -> Tensor:
        x_t = x_t.double()
        apart = problem.teacher.of(batch.cond).log_density(x_t, t) - fake.of(batch.cond).log_density(x_t, t)
        return (apart + moved[:, 0] + (moved[:, 1:] * x_t).sum(1))[:, None]

    losses = made(problem, student, fake, problem.w, ratio).critic_loss(batch, step)
    slopes = torch.autograd.grad(losses["discriminator"], moved)[0]
    yield Check("what telling apart teaches the log ratio of the densities, in standard errors", off_zero(slopes), 6)
