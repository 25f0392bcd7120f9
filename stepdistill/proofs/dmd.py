"""DMD: the gradient is the normalised difference of exact scores, beside that of the distance to the teacher's own
pictures; both vanish where the student is the teacher, the one in law, the other picture by picture."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..diffusion.contracts import Batch, Pairs, Role
from ..methods.distribution.dmd import DMD, Settings
from .paths import elsewhere
from .paths_dmd import paths
from .players import OffsetRole, error, role_inputs, simulated
from .problem import Affine, Check, Problem, difference, gradient, stock_times

COUNT, MANY = 256, 5_000


def made(problem: Problem, student: Affine, critic: Role) -> DMD:
    roles = {"teacher": problem.teacher, "student": student, "critic": critic}
    return DMD(Settings(regression_weight=0.4), roles, problem.w,
               problem.sampler(DMD.inference(Settings(), 1, problem.schedule)))


def paired(problem: Problem, count: int) -> Batch:
    """Noises, and where the exact flow of the guided teacher carries them."""
    noise, ends = problem.normal(count, problem.dim), torch.tensor([[1.0], [0.0]], dtype=torch.float64).expand(2, count)
    y = problem.teacher.of(problem.guided_cond(count, problem.w)).flow(noise, *ends)
    return replace(problem.batch(count), x0=y, pairs=Pairs(noise, y[:, None], ends[1][:, None]))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    student, batch, step = problem.affine(), paired(problem, COUNT), problem.step(COUNT)
    method = made(problem, student, problem.law(student.law[1]))
    losses = method.student_loss(batch, step)

    z, t = simulated(student, method.sampler, step)[0], method.matched(step.uniform("t"))
    x = student(z, t, batch.cond).x0
    x_t = problem.schedule.add_noise(x.detach(), step.normal("noise", batch.shape).double(), t)
    real = problem.teacher(x_t, t, problem.guided_cond(COUNT, problem.w)).x0
    apart = (method.critic(x_t, t, batch.cond).x0 - real) / (x.detach() - real).abs().mean(1, keepdim=True)
    known = gradient((apart * x).mean(), student)
    yield Check("student's gradient against that of (fake - real) x / |x - real|, exact guided scores; relative",
                difference(gradient(losses["matching"], student), known), 1e-5)

    noise, off = batch.pairs.noise, 0.4 * 2 / problem.dim * (student(batch.pairs.noise, t, batch.cond).x0
                                                             - batch.x0).detach()
    pulled = torch.cat([off.mean(0), (off.T @ noise / COUNT).flatten()])
    yield Check("gradient of the distance to the pairs against 2 weight (x - y) of each one's own noise; relative",
                difference(gradient(losses["regression"], student), pulled), 1e-6)

    mean, covariance = problem.guided_cond(1, problem.w).text[0], problem.covariance
    right = Affine(problem.schedule, mean.requires_grad_(), torch.linalg.cholesky(covariance).requires_grad_())
    rest = made(problem, right, problem.law(covariance, mean.detach())).student_loss(batch, step)["matching"]
    yield Check("gradient of the scores where the student draws as the guided teacher, over its usual size",
                (gradient(rest, right).norm() / known.norm()).item(), 1e-5)

    one, none = torch.eye(problem.dim).double(), torch.zeros(1, problem.dim).double()
    flow = lambda z: problem.teacher.of(problem.guided_cond(len(z), problem.w)).flow(z, torch.ones(len(z)).double(),
                                                                                     torch.zeros(len(z)).double())
    carried = Affine(problem.schedule, flow(none)[0].requires_grad_(),
                     (flow(one) - flow(none)).T.clone().requires_grad_())
    rest = gradient(made(problem, carried, method.critic).student_loss(batch, step)["regression"], carried)
    yield Check("gradient of the distance where the student is the teacher's flow, over its usual size",
                (rest.norm() / pulled.norm()).item(), 1e-6)

    yield from of_the_critic(problem, student)


def of_the_critic(problem: Problem, student: Affine) -> Iterator[Check]:
    """The critic's loss, and what each network is told."""
    pupil, batch = OffsetRole(problem.law(*reversed(student.law)), MANY, problem.dim), paired(problem, MANY)
    first, step = problem.step(MANY), problem.step(MANY, "critic")
    method = made(problem, student, pupil)
    method.student_loss(batch, first)
    step.kept.update(first.kept)
    x = student(first.normal("start", batch.shape), torch.ones(MANY).double(), batch.cond).x0.detach()
    t = method.trained(step.uniform("t"))
    known = error(pupil, x, step.normal("noise", batch.shape), t, batch.cond, problem.kind).mean()
    yield from pupil.checks(method.critic_loss(batch, step)["denoising"], known)
    yield from role_inputs(problem, lambda student, critic: made(problem, student, critic),
                           stock_times(*Settings().t_range), stock_times())
