"""Uni-Instruct: with exact critic and ratio the step is the gradient of the weighted Fisher divergence, of the
student's law too; of the reverse KL it is SiD's to the last bit."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..diffusion.contracts import Role
from ..losses.divergence import DIVERGENCES, elasticity, relative_weight
from ..losses.matching import score_identity
from ..methods.distribution.sid import Settings as SettingsOfSiD
from ..methods.distribution.sid import SiD
from ..methods.distribution.uni_instruct import Settings, UniInstruct
from .dmd2 import FunctionDiscriminator
from .paths import elsewhere
from .paths_uni_instruct import paths
from .players import exits, role_inputs
from .problem import Check, Problem, difference, gradient, largest, stock_times

COUNT, STEPS, POINTS = 256, 4, 64
PLAIN = Settings(gan_weight=0, ratio_start=0)


def made(problem: Problem, student: Role, critic: Role, logits: Callable[[Tensor, Tensor], Tensor],
         settings: Settings = PLAIN) -> UniInstruct:
    roles = {"teacher": problem.teacher, "student": student, "critic": critic,
             "discriminator": FunctionDiscriminator(critic, logits)}
    return UniInstruct(settings, roles, problem.w,
                       problem.sampler(UniInstruct.inference(settings, STEPS, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    student, batch, towards = problem.affine(), problem.batch(COUNT), problem.normal(problem.dim)
    critic = problem.law(*reversed(student.law))
    logits = lambda x_t, t: 0.3 * (x_t.double() @ towards)[:, None]
    chosen = SettingsOfSiD(alpha=0.5, critic_training_guidance=1.0)
    roles = {"teacher": problem.teacher, "student": student, "critic": critic}
    sid = SiD(chosen, roles, problem.w, problem.sampler(SiD.inference(chosen, STEPS, problem.schedule)))
    by_sid = [gradient(sid.student_loss(batch, step)["identity"], student) for step in exits(problem, COUNT, STEPS)]
    for name, settings in (("of the reverse KL", replace(PLAIN, divergence="reverse_kl")),
                           ("before the ratio is read, of the reverse KL",
                            replace(PLAIN, divergence="reverse_kl", ratio_start=100))):
        method = made(problem, student, critic, logits, settings)
        found = [gradient(method.student_loss(batch, step)["identity"], student)
                 for step in exits(problem, COUNT, STEPS)]
        yield Check(f"gradient {name} against SiD's at alpha 1/2, at each exit; relative",
                    largest(*map(difference, found, by_sid)), 1e-12)
    worst = largest(*(of_law(problem, name) for name in DIVERGENCES))
    yield Check("expected gradient of every divergence, against half of that of E h(r) |d|^2; relative", worst, 1e-6)
    levels = stock_times(*PLAIN.t_range)
    yield from role_inputs(problem, lambda student, critic: made(problem, student, critic, logits, Settings()), levels,
                           levels, STEPS, shares=False)


def of_law(problem: Problem, name: str) -> float:
    """In one dimension at one level, by quadrature: N(mean, deviation^2) of teacher and student, the latter the wider.

    E h(r) |d|^2 is differentiated as the number that it is, with the student's law in r, d and the expectation; the
    loss with r, d and the critic as functions that stay, and x alone that moves.
    """
    t = problem.times(1, 0.3, 0.7)
    alpha, sigma = problem.schedule.alpha(t).item(), problem.schedule.sigma(t).item()
    real = torch.tensor([problem.uniform(-0.2, 0.2), problem.uniform(0.5, 0.7)], dtype=torch.float64)
    fake = torch.tensor([problem.uniform(-0.2, 0.2), problem.uniform(0.8, 1.0)], dtype=torch.float64,
                        requires_grad=True)
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(POINTS))
    weights = weights / weights.sum()

    def spread(law: Tensor) -> Tensor:
        return alpha**2 * law[1] ** 2 + sigma**2

    def clean(x_t: Tensor, law: Tensor) -> Tensor:
        return law[0] + alpha * law[1] ** 2 / spread(law) * (x_t - alpha * law[0])

    def ratio(x_t: Tensor, law: Tensor) -> Tensor:
        terms = [((x_t - alpha * one[0]) ** 2 / spread(one) + spread(one).log()) / 2 for one in (law, real)]
        return (terms[0] - terms[1]).exp()

    x_t = alpha * fake[0] + spread(fake).sqrt() * nodes
    whole = (weights * relative_weight(name, ratio(x_t, fake)) * (clean(x_t, real) - clean(x_t, fake)) ** 2).sum()
    known, = torch.autograd.grad(whole / 2, fake)

    z, eps = (each.reshape(-1, 1) for each in torch.meshgrid(nodes, nodes, indexing="ij"))
    held, x = fake.detach(), fake[0] + fake[1] * z
    x_t = alpha * x + sigma * eps
    r = ratio(x_t, held)[:, 0]
    losses = score_identity(x, clean(x_t, real), clean(x_t, held), (1 + elasticity(name, r)) / 2,
                            relative_weight(name, r))
    found, = torch.autograd.grad((torch.outer(weights, weights).flatten() * losses).sum(), fake)
    return difference(found, known)
