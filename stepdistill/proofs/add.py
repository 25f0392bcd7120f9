"""ADD: the hinge game through a decoder and a feature network, R1 of linear heads, and where score distillation
rests."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.guidance import drawn
from ..methods.adversarial.add import ADD, Settings
from .paths import elsewhere
from .paths_add import paths
from .problem import (
    Check,
    FunctionRole,
    Problem,
    condition_error,
    difference,
    gradient,
    largest,
    off_law,
    off_zero,
    stock_times,
)

COUNT, FEW, MANY, STEPS = 256, 5_000, 20_000, 4


class Pictures:
    """A linear decoder, two linear feature maps of pixels, and a linear head on each: pixels (B, 3), maps (B, 2), w (2,
    2)."""

    def __init__(self, problem: Problem) -> None:
        self.decoder, self.first = problem.normal(3, problem.dim), problem.normal(2, 3)
        self.second = problem.normal(2, 3)

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.decoder.to(latents).T

    def features(self, pixels: Tensor) -> list[Tensor]:
        return [pixels @ self.first.to(pixels).T, pixels @ self.second.to(pixels).T]

    def made(self, problem: Problem, student, w: Tensor) -> ADD:
        heads = lambda maps, cond: [(m @ head)[:, None] for m, head in zip(maps, w)]
        roles = {"teacher": problem.teacher, "student": student, "decode": self.decode, "features": self.features,
                 "discriminator": heads}
        return ADD(Settings(), roles, problem.w, problem.sampler(ADD.inference(Settings(), STEPS, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    pictures = Pictures(problem)
    yield from game(problem, pictures)
    yield from score(problem, pictures)
    yield from inputs(problem, pictures)
    yield from rest(problem, pictures)


def game(problem: Problem, pictures: Pictures) -> Iterator[Check]:
    student, w = problem.affine(), (0.1 * problem.normal(2, 2)).requires_grad_()
    method, batch, step = pictures.made(problem, student, w), problem.batch(COUNT), problem.step(COUNT)
    found = gradient(method.student_loss(batch, step)["gan"], student)
    pull = -(w[0] @ pictures.first + w[1] @ pictures.second).detach() @ pictures.decoder / COUNT
    known = torch.cat([COUNT * pull, (pull[:, None] * started(problem, method, batch, step).sum(0)).flatten()])
    yield Check("student's gradient against -sum of the heads, through features, decoder and x_0; relative",
                difference(found, known), 1e-5)

    losses = method.critic_loss(batch, critic := problem.step(COUNT, "discriminator", kept=step.kept))
    slope, = torch.autograd.grad(losses["r1"], w)
    gamma = Settings().r1_weight
    yield Check("R1 of linear heads against |w|^2, and its slope against 2 w; relative",
                largest(abs(losses["r1"].item() / (gamma * w.square().sum().item()) - 1),
                        difference(slope, 2 * gamma * w.detach())), 1e-9)

    blind = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    method = pictures.made(problem, student, blind)
    gan, losses = method.student_loss(batch, step)["gan"], method.critic_loss(batch, critic)
    yield Check("losses where two heads cannot tell, from 0, 4 and 0",
                largest(abs(gan.item()), abs(losses["discriminator"].item() - 4), abs(losses["r1"].item())), 1e-9)

    slope, = torch.autograd.grad(losses["discriminator"], blind)
    real, fake = (torch.stack(pictures.features(pixels)).mean(1)
                  for pixels in (pictures.decode(batch.x0), step.kept["pixels"]))
    yield Check("heads' slope at logit 0 against features of fake - real; relative",
                difference(slope, fake - real), 1e-5)


def started(problem: Problem, method: ADD, batch, step) -> Tensor:
    """What the student is given."""
    s, noise = method.started(step.uniform("s")), step.normal("start", batch.shape)
    return torch.where(s[:, None] == 1, noise, problem.schedule.add_noise(batch.x0, noise, s))


def score(problem: Problem, pictures: Pictures) -> Iterator[Check]:
    student = problem.affine()
    method = pictures.made(problem, student, torch.zeros(2, 2, dtype=torch.float64))
    batch, step = problem.batch(COUNT), problem.step(COUNT)
    found = gradient(method.student_loss(batch, step)["distillation"], student)

    x_s = started(problem, method, batch, step)
    x, t = student(x_s, torch.ones(COUNT), batch.cond).x0.detach(), method.level(step.uniform("t"))
    x_t = problem.schedule.add_noise(x, step.normal("noise", batch.shape), t)
    aim = problem.teacher(x_t, t, problem.guided_cond(COUNT, drawn(problem.w, step))).x0
    weight = 2 * Settings().distillation_weight * problem.schedule.alpha(t) / 3 / COUNT
    pull = weight[:, None] * (x - aim) @ pictures.decoder.T @ pictures.decoder
    known = torch.cat([pull.sum(0), (pull.T @ x_s).flatten()])
    yield Check("distillation's gradient against 2 lambda alpha_t (x - guided x_0), as pixels; relative",
                difference(found, known), 1e-5)


def inputs(problem: Problem, pictures: Pictures) -> Iterator[Check]:
    """What student, teacher and heads are told."""
    student, teacher = (FunctionRole(problem.schedule, lambda x, t, cond: x) for _ in range(2))
    method, conditions = pictures.made(problem, student, torch.zeros(2, 2, dtype=torch.float64)), []
    method.teacher, heads = teacher, method.discriminator
    method.discriminator = lambda maps, cond: conditions.append(cond) or heads(maps, cond)
    batch, step = replace(problem.batch(FEW), cond=problem.prompts(FEW)), problem.step(FEW)
    method.student_loss(batch, step)
    method.critic_loss(batch, problem.step(FEW, "discriminator", kept=step.kept))
    for role, law, label in ((student, 1 - torch.arange(4).double() / 4, "student's"),
                             (teacher, stock_times(), "teacher's")):
        yield Check(f"moments of the {label} times against the uniform law's, in standard errors",
                    off_law(role.calls[0][1][-FEW:], law), 6)
    conditions += [role.calls[0][2] for role in (student, teacher)]
    yield Check("the prompts of student, teacher and heads from the batch's",
                condition_error(conditions, batch.cond), 0)


def rest(problem: Problem, pictures: Pictures) -> Iterator[Check]:
    """E[x - x_0(x_t)] = sigma^2 (alpha^2 C + sigma^2)^-1 (x - mean): score distillation alone draws everything to the
    guided mean."""
    mean = problem.guided_cond(1, problem.w).text[0]
    for away, says in ((torch.zeros_like(mean), "at the guided mean"),
                       (problem.normal(problem.dim), "elsewhere, from its expectation")):
        method = pictures.made(problem, problem.teacher, torch.zeros(2, 2, dtype=torch.float64))
        batch, step = problem.batch(MANY), problem.step(MANY)
        x = (mean + away).expand(MANY, -1).clone().requires_grad_()
        found, = torch.autograd.grad(method.distillation(x, pictures.decode(x), batch, step).sum(), x)
        t = method.level(step.uniform("t"))
        alpha, sigma = (f(t)[:, None] for f in (problem.schedule.alpha, problem.schedule.sigma))
        variances, axes = torch.linalg.eigh(problem.covariance)
        expected = (away @ axes * sigma**2 / (alpha**2 * variances + sigma**2)) @ axes.T
        expected = 2 * alpha / 3 * expected @ pictures.decoder.T @ pictures.decoder
        yield Check(f"mean slope of score distillation {says}, in standard errors", off_zero(found - expected), 6)
