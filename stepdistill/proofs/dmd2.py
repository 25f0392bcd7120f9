"""DMD2: at every exit of the student's rollout the gradient is the normalised difference of exact scores; the
discriminator's optimum is the log ratio of the densities, and one that cannot tell pulls nowhere."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.draws import Step
from ..diffusion.prediction import Prediction
from ..diffusion.schedule import like
from ..methods.distribution.dmd2 import DMD2, Settings
from .paths import elsewhere
from .paths_dmd2 import paths
from .players import OffsetRole, error, exits, role_inputs, simulated
from .problem import Affine, Check, Problem, difference, gradient, largest, off_zero, stock_times

COUNT, MANY, STEPS = 256, 5_000, 4
PLAIN, GAN = Settings(gan_weight=0), Settings(gan_weight=0.7, critic_gan_weight=0.3)


@dataclass
class FunctionDiscriminator:
    """A discriminator that says judges(x_t, t), (B, 1), beside its critic's prediction."""

    critic: Role
    logits: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.with_prediction(x_t, t, cond)[1]

    def with_prediction(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Prediction, Tensor]:
        return self.critic(x_t, t, cond), self.logits(x_t, t)


def made(problem: Problem, student: Affine, critic: Role, w: float, steps: int = 1,
         logits: Callable[[Tensor, Tensor], Tensor] | None = None) -> DMD2:
    roles = {"teacher": problem.teacher, "student": student, "critic": critic}
    settings = PLAIN if logits is None else GAN
    return DMD2(settings, roles if logits is None else roles | {"discriminator": FunctionDiscriminator(critic, logits)},
                w,
                problem.sampler(DMD2.inference(settings, steps, problem.schedule)))


def noised(problem: Problem, method: DMD2, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """x_t, and its times (B,), as the student's loss draws them."""
    t = method.matched(step.uniform("t"))
    return problem.schedule.add_noise(x, step.normal("noise", x.shape[1:]).to(x), t), t


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    student, batch, w = problem.affine(), problem.batch(COUNT), problem.w
    worst, known = 0.0, torch.empty(0)
    for step in exits(problem, COUNT, STEPS):
        sampler = made(problem, student, problem.teacher, w, STEPS).sampler
        z, _, covariance = simulated(student, sampler, step)
        method = made(problem, student, problem.law(covariance), w, STEPS)
        found = gradient(method.student_loss(batch, step)["matching"], student)
        x = student(z, torch.ones(COUNT), batch.cond).x0
        x_t, t = noised(problem, method, x.detach(), step)
        real = problem.teacher(x_t, t, problem.guided_cond(COUNT, w)).x0
        fake = method.critic(x_t, t, batch.cond).x0
        apart = (fake - real) / (x.detach() - real).abs().mean(1, keepdim=True)
        known = gradient((apart * x).mean(), student)
        worst = largest(worst, difference(found, known))
    yield Check(f"student's gradient at each of {STEPS} exits against that of (fake - real) x / |x - real|; relative",
                worst, 1e-5)

    mean, covariance, step = problem.guided_cond(1, w).text[0], problem.covariance, problem.step(COUNT)
    right = Affine(problem.schedule, mean.requires_grad_(), torch.linalg.cholesky(covariance).requires_grad_())
    rest = gradient(made(problem, right, problem.law(covariance, mean.detach()),
                         w).student_loss(batch, step)["matching"], right)
    yield Check("gradient where the student draws as the guided teacher, over its usual size",
                (rest.norm() / known.norm()).item(), 1e-5)
    yield from fooled(problem, student)
    yield from separation(problem, student)
    with_discriminator = lambda student, critic: made(problem, student, critic, w, STEPS, lambda x_t, t: x_t[:, :1])
    yield from role_inputs(problem, with_discriminator, stock_times(*GAN.t_range), stock_times(), STEPS, shares=False)


def fooled(problem: Problem, student: Affine) -> Iterator[Check]:
    """The student's part in the game."""
    batch, step, towards = problem.batch(COUNT), problem.step(COUNT), problem.normal(problem.dim)
    critic = problem.law(*reversed(student.law))
    logits = lambda x_t, t: (x_t.double() @ towards + t)[:, None]
    method = made(problem, student, critic, problem.w, logits=logits)
    found = gradient(method.student_loss(batch, step)["gan"], student)
    z, _, _ = simulated(student, method.sampler, step)
    x = student(z, torch.ones(COUNT), batch.cond).x0
    x_t, t = noised(problem, method, x.detach(), step)
    pull = -torch.sigmoid(-logits(x_t, t)) * like(problem.schedule.alpha(t), x_t) * towards
    known = gradient(GAN.gan_weight * (pull * x).sum(1).mean(), student)
    yield Check("gradient of fooling it against -sigmoid(-logit) alpha grad(logit); relative",
                difference(found, known), 1e-5)

    alone = gradient(made(problem, student, critic, problem.w).student_loss(batch, problem.step(COUNT))["matching"],
                     student)
    blind = made(problem, student, critic, problem.w, logits=lambda x_t, t: 0 * x_t[:, :1] + t[:, None])
    both = gradient(sum(blind.student_loss(batch, step).values()), student)
    yield Check("what a discriminator that cannot tell adds to the gradient; relative", difference(both, alone), 1e-9)


def separation(problem: Problem, student: Affine) -> Iterator[Check]:
    """The other two's part: slopes at the exact denoiser, and at the log ratio of the densities moved by an affine of
    x_t."""
    batch, step = problem.batch(MANY), problem.step(MANY, "critic")
    mean, covariance = student.law
    fake, pupil = problem.law(covariance, mean), OffsetRole(problem.law(covariance, mean), MANY, problem.dim)
    moved = torch.zeros(MANY, 1 + problem.dim, dtype=torch.float64, requires_grad=True)

    def ratio(x_t: Tensor, t: Tensor) -> Tensor:
        x_t = x_t.double()
        apart = problem.teacher.of(batch.cond).log_density(x_t, t) - fake.of(batch.cond).log_density(x_t, t)
        return (apart + moved[:, 0] + (moved[:, 1:] * x_t).sum(1))[:, None]

    method = made(problem, student, pupil, problem.w, logits=ratio)
    losses = method.critic_loss(batch, step)
    x, t = student(step.normal("start", batch.shape), torch.ones(MANY),
                   batch.cond).x0.detach(), method.trained(step.uniform("t"))
    known = error(pupil, x, step.normal("noise", batch.shape), t, batch.cond, problem.kind).mean()
    yield from pupil.checks(losses["denoising"], known)
    slopes = torch.autograd.grad(losses["discriminator"], moved)[0]
    yield Check("what telling apart teaches the log ratio of the densities, in standard errors", off_zero(slopes), 6)
