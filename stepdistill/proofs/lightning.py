"""SDXL-Lightning: the teacher's small steps in closed form, the game's equilibrium, and what a discriminator of pairs
sees beyond one of landings."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..diffusion.draws import Step
from ..diffusion.flow_map import secant_target
from ..diffusion.schedule import like
from ..diffusion.solvers import ddim
from ..methods.adversarial.lightning import Lightning, Settings
from .paths import elsewhere
from .paths_lightning import paths
from .problem import Check, FunctionRole, Problem, difference, gradient, largest, off_zero

COUNT, MANY, STEPS, NODES = 256, 20_000, 2, 8


@dataclass
class FunctionDiscriminator:
    """A discriminator in closed form: logits(x_r, r, x_t, t, cond) (B, K), x_t and t None where it sees the landing
    alone."""

    logits: Callable[..., Tensor]

    def __call__(self, x_r: Tensor, r: Tensor, cond: Condition) -> Tensor:
        return self.logits(x_r, r, None, None, cond)

    def pair(self, x_r: Tensor, r: Tensor, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.logits(x_r, r, x_t, t, cond)


def made(problem: Problem, student, discriminator=None, w: float = 1.0, **settings) -> Lightning:
    settings = Settings(nodes=NODES, **settings)
    roles = {"teacher": problem.teacher, "student": student} | ({} if discriminator is None
                                                                else {"discriminator": discriminator})
    return Lightning(settings, roles, w, problem.sampler(Lightning.inference(settings, STEPS, problem.schedule)))


def landing(problem: Problem, x_t: Tensor, node: Tensor, mean: Tensor) -> Tensor:
    """Where NODES / STEPS steps of DDIM carry x_t from node / NODES: each maps the principal axes' deviations by a
    factor, (a_r a_t V + s_r s_t) / (a_t^2 V + s_t^2), and the law's mean along with alpha."""
    variances, axes = torch.linalg.eigh(problem.covariance)
    a, s = (f(torch.linspace(0, 1, NODES + 1, dtype=torch.float64))[:, None]
            for f in (problem.schedule.alpha, problem.schedule.sigma))
    gain = torch.ones(len(x_t), problem.dim, dtype=torch.float64)
    for j in range(NODES // STEPS):
        t, r = node - j, node - j - 1
        gain = gain * (a[r] * a[t] * variances + s[r] * s[t]) / (a[t] ** 2 * variances + s[t] ** 2)
    return a[node - NODES // STEPS] * mean + ((x_t - a[node] * mean) @ axes * gain) @ axes.T


def node_of(step) -> Tensor:
    return (step.integers("start", STEPS) + 1) * NODES // STEPS


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    yield from landings(problem)
    yield from game(problem, "pair")
    yield from game(problem, "single")
    yield from flipped(problem)


def landings(problem: Problem) -> Iterator[Check]:
    batch, step = problem.batch(COUNT), problem.step(COUNT)
    mean = problem.guided_cond(1, problem.w).text[0]

    def secant(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        x_r = landing(problem, x_t, (t * NODES).round().long(), mean)
        return secant_target(x_t, x_r, t, t - 1 / STEPS, problem.schedule)

    for student, says in ((FunctionRole(problem.schedule, secant), "its one step ends where the guided teacher's do"),
                          (problem.affine(), "it is another's")):
        x_t, times = made(problem, student, w=problem.w, objective="mse").started(batch, step)
        found = made(problem, student, w=problem.w, objective="mse").regression(batch, step)["mse"]
        x_r = landing(problem, x_t, node_of(step), mean)
        a, s = (f(times[[0, -1]])[..., None] for f in (problem.schedule.alpha, problem.schedule.sigma))
        x_0 = student(x_t, times[0], batch.cond).x0
        known = (a[1] * x_0 + s[1] * (x_t - a[0] * x_0) / s[0] - x_r).square().mean()
        exact = isinstance(student, FunctionRole)
        yield Check(f"mean squared error of the landing where {says}" + ("" if exact else "; relative"),
                    found.item() if exact else abs(found / known - 1).item(), 1e-9)

    method, noise = made(problem, FunctionRole(problem.schedule, teacher_step(problem)),
                         objective="mse"), problem.normal(COUNT, problem.dim)
    wanted = ddim(problem.teacher, noise, torch.linspace(1, 0, NODES + 1, dtype=torch.float64), batch.cond)
    yield Check(f"the right student's samples in {STEPS} stock steps against the teacher's in {NODES}; relative",
                difference(method.sampler(method.student, noise, batch.cond), wanted), 1e-9)


def game(problem: Problem, objective: str) -> Iterator[Check]:
    figures = [played(problem, objective, at) for at in ((), (0.25, 0.75))]
    names = ("student's gradient against -sigmoid(-l) u down its one step", "heads' slope against sigmoid(l) fake "
             "- sigmoid(-l) real")
    for name, found in zip(names, zip(*figures)):
        yield Check(f"{objective}: {name}, with noise on the data and without; relative", largest(*found), 1e-5)
    yield Check(f"{objective}: losses from log 2 and 2 log 2, and the critic's slope, where the student lands as the "
                "teacher",
                unrest(problem, objective), 1e-9)


def played(problem: Problem, objective: str, at: tuple[float, ...]) -> tuple[float, float]:
    """How far the gradients of student and heads are from the known ones. x_t and t count for nothing where they are
    not shown."""
    batch, step, student = problem.batch(COUNT), problem.step(COUNT), problem.affine()
    u, v, e = (0.3 * problem.normal(2, problem.dim) for _ in range(3))
    (c, d), theta = problem.normal(2, 2), torch.zeros(2, problem.dim, dtype=torch.float64, requires_grad=True)

    def other_terms(r: Tensor, x_t: Tensor | None, t: Tensor | None, cond: Condition) -> Tensor:
        return r[:, None] * c + cond.text @ e.T + (0 if x_t is None else x_t @ v.T + t[:, None] * d)

    def method_of(w: Tensor) -> Lightning:
        return made(problem, student, FunctionDiscriminator(lambda x_r, r, *rest: x_r @ w.T + other_terms(r, *rest)),
                    objective=objective, discriminator_times=at)

    t = node_of(step).double() / NODES
    r, x_t = t - 1 / STEPS, problem.schedule.start(batch.x0, step.normal("noise", batch.shape), t)
    seen = (x_t, t, batch.cond) if objective == "pair" else (None, None, batch.cond)

    found = gradient(method_of(u).student_loss(batch, step)["gan"], student)
    x_r, q = step.kept["x_r"], problem.schedule.sigma(r) / problem.schedule.sigma(t)
    slope = problem.schedule.alpha(r) - q * problem.schedule.alpha(t)                     # of the landing in x_0
    x_s, s, kept = shown(problem, x_r, r, at, step)
    pull = -(torch.sigmoid(-(x_s @ u.T + other_terms(s, *seen))) @ u / 2) * (kept * slope)[:, None] / COUNT
    known = torch.cat([pull.sum(0), (pull.T @ x_t).flatten()])

    critic = problem.step(COUNT, "critic+discriminator", kept=step.kept)
    slopes, = torch.autograd.grad(method_of(theta).critic_loss(batch, critic)["discriminator"], theta)
    (fake, s, _), (real, _, _) = (shown(problem, x, r, at, critic)
                                  for x in (x_r, landing(problem, x_t, node_of(step), batch.cond.text)))
    logits = other_terms(s, *seen)
    apart = (torch.sigmoid(logits).T @ fake - torch.sigmoid(-logits).T @ real) / (2 * COUNT)
    return difference(found, known), difference(slopes, apart)


def shown(problem: Problem, x_r: Tensor, r: Tensor, at: tuple[float, ...], step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """What is judged, the time that it is told, and how much of x_r there is in it: at r = 0 it is noised to one of
    `at`."""
    s = torch.tensor(at or (0.001,), dtype=torch.float64)[(step.uniform("judged s") * max(len(at), 1)).long()]
    noisy = (r == 0) & bool(at)
    kept, added = torch.where(noisy, problem.schedule.alpha(s), 1), torch.where(noisy, problem.schedule.sigma(s), 0)
    noised = like(kept, x_r) * x_r + like(added, x_r) * step.normal("judged noise", x_r.shape[1:])
    return noised, torch.where(r > 0, r, s), kept


def unrest(problem: Problem, objective: str) -> float:
    theta = torch.zeros(2, problem.dim, dtype=torch.float64, requires_grad=True)
    discriminator = FunctionDiscriminator(lambda x_r, r, x_t, t, cond: (x_r + (0 if x_t is None else x_t**2)) @ theta.T)
    method = made(problem, FunctionRole(problem.schedule, teacher_step(problem)), discriminator, objective=objective)
    batch, step = problem.batch(COUNT), problem.step(COUNT)
    gan = method.student_loss(batch, step)["gan"].item()
    loss = method.critic_loss(batch, problem.step(COUNT, "critic+discriminator", kept=step.kept))["discriminator"]
    slope, = torch.autograd.grad(loss, theta)
    return largest(abs(gan - log(2)), abs(loss.item() - 2 * log(2)), slope.abs().max().item())


def teacher_step(problem: Problem, sign: float = 1.0) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """Of the student that lands as the teacher or, sign = -1, on the other side of the mean landing."""
    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        node = (t * NODES).round().long()
        middle = torch.where(like(t < 1, x_t).bool(), like(problem.schedule.alpha(t), x_t) * cond.text, 0)
        centre = landing(problem, middle, node, cond.text)
        x_r = centre + sign * (landing(problem, x_t, node, cond.text) - centre)
        return secant_target(x_t, x_r, t, t - 1 / STEPS, problem.schedule)
    return x0_of


def flipped(problem: Problem) -> Iterator[Check]:
    """The map whose deviations are turned round draws the same landings: only who also sees x_t can tell."""
    figure = distance_from_rest(problem, "single")
    yield Check("slope of quadratic heads that see the flipped map's landings alone, in standard errors", figure, 6)
    yield Check("6 standard errors over that of heads that see pairs", 6 / distance_from_rest(problem, "pair"), 1)


def distance_from_rest(problem: Problem, objective: str) -> float:
    """How far quadratic heads at logit 0 are from rest before the flipped map, in standard errors."""
    seen: list[Tensor] = []

    def logits(x_r: Tensor, r: Tensor, x_t: Tensor | None, t: Tensor | None, cond: Condition) -> Tensor:
        other = x_r if x_t is None else x_t
        seen.append(torch.cat([x_r, (x_r[:, :, None] * other[:, None, :]).flatten(1)], 1))
        return 0 * x_r[:, :1]

    method = made(problem, FunctionRole(problem.schedule, teacher_step(problem, -1.0)), FunctionDiscriminator(logits),
                  objective=objective)
    batch, step = problem.batch(MANY), problem.step(MANY)
    method.student_loss(batch, step)
    method.critic_loss(batch, problem.step(MANY, "critic+discriminator", kept=step.kept))
    _, real, fake = seen
    return off_zero(fake - real)
