"""SiD: the loss has the gradient of the Fisher divergence, through both networks, and its guidance ends at w kappa_1 /
kappa_2."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.guidance import guided
from ..diffusion.prediction import Prediction
from ..diffusion.schedule import Schedule
from ..losses.matching import score_identity
from ..methods.distribution.sid import Settings, SiD
from .paths import elsewhere
from .paths_sid import paths
from .players import OffsetRole, error, exits, role_inputs, simulated
from .problem import Affine, Check, FunctionRole, Problem, difference, gradient, largest, stock_times

COUNT, MANY, STEPS = 256, 5_000, 4


@dataclass(frozen=True)
class Stretched:
    """A role that hears of prompts `by` times as far from the unconditional mean `null` (D,) as they are."""

    role: Role
    null: Tensor
    by: float

    @property
    def schedule(self) -> Schedule:
        return self.role.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self.role(x_t, t, cond.replace(text=self.null + self.by * (cond.text - self.null)))


def made(problem: Problem, student: Role, critic: Role, steps: int = 1, **settings: float) -> SiD:
    roles, chosen = {"teacher": problem.teacher, "student": student, "critic": critic}, Settings(**settings)
    return SiD(chosen, roles, problem.w, problem.sampler(SiD.inference(chosen, steps, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    yield pathwise(problem)
    yield from divergences(problem)
    yield from guidances(problem)
    levels = stock_times(*Settings().t_range)
    yield from role_inputs(problem, lambda student, critic: made(problem, student, critic, STEPS), levels, levels,
                           STEPS, False, Settings().drop)


# -- the loss at every sample
# -----------------------------------------------------------------------------------------------

def denoiser(problem: Problem, t: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t] = A x_t + b of N(mean, covariance): A (B, D, D), b (B, D). All float64."""
    alpha, sigma = (c(t)[:, None, None] for c in (problem.schedule.alpha, problem.schedule.sigma))
    one = torch.eye(problem.dim, dtype=torch.float64)
    A = torch.linalg.solve(alpha**2 * covariance + sigma**2 * one, alpha * covariance)
    return A, mean - alpha[:, 0] * (A @ mean)


def times(A: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("nij,nj->ni", A, x)


def pathwise(problem: Problem) -> Check:
    """With any critic: in x the slope of |d|^2 is 2 alpha_t D' d, D of d = D x_t + e, and that of the product has two
    parts."""
    student, batch, alpha = problem.affine(), problem.batch(COUNT, data=False), problem.uniform(0.5, 1.5)
    kappa, law = problem.uniform(1.0, 3.0), problem.law(problem.drawn_covariance())
    method, worst = made(problem, student, law, STEPS, alpha=alpha, critic_guidance=kappa), 0.0
    for step in exits(problem, COUNT, STEPS):
        found = gradient(method.student_loss(batch, step)["identity"], student)
        z, t = simulated(student, method.sampler, step)[0], method.level(step.uniform("t"))
        x = (student.m + z @ student.S.T).detach()
        x_t = problem.schedule.add_noise(x, step.normal("noise", batch.shape).double(), t)
        (A, a), (B, b) = (denoiser(problem, t, problem.guided_cond(1, w).text[0], c)
                          for w, c in ((problem.w, problem.covariance), (kappa, law.covariance)))
        real, fake, at = times(A, x_t) + a, times(B, x_t) + b, problem.schedule.alpha(t)[:, None]
        D, d = (A - B).mT, real - fake
        slope = at * times(D, 2 * (1 - alpha) * d + fake - x) + at * times(B.mT, d) - d
        slope = slope / (x - real).abs().mean(1, keepdim=True) / x.numel()
        worst = largest(worst, difference(found, torch.cat([slope.sum(0), (slope.T @ z).flatten()])))
    return Check(f"student's gradient at each of {STEPS} exits against the slope in x, through both "
                 "denoisers; relative", worst, 1e-5)


# -- the loss in expectation
# --------------------------------------------------------------------------------------------------

def whitened(points: Tensor) -> Tensor:
    """Points (N, K) made to have mean 0 and covariance 1 exactly, so that their mean of a quadratic is its
    expectation."""
    points = points - points.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(points.T @ points / len(points)),
                                         points.T, upper=False).T


def divergences(problem: Problem) -> Iterator[Check]:
    """At one level, weight 1: every term is quadratic in (z, eps)."""
    student, dim = problem.affine(), problem.dim
    z, eps = whitened(problem.normal(64, 2 * dim)).split(dim, 1)
    t = problem.times(1, 0.1, 0.95).expand(64)
    A, a = denoiser(problem, t, problem.guided_cond(1, problem.w).text[0], problem.covariance)

    def drawn() -> tuple[Tensor, Tensor]:
        x = student.m + z @ student.S.T
        return x, problem.schedule.add_noise(x, eps, t)

    def loss(alpha: float) -> Tensor:
        (x, x_t), (B, b) = drawn(), denoiser(problem, t, *student.law)
        return score_identity(x, times(A, x_t) + a, times(B, x_t) + b, alpha, torch.ones(64)).mean()

    def fisher(x_t: Tensor) -> Tensor:
        B, b = denoiser(problem, t, student.m, student.S @ student.S.T)
        return (times(A - B, x_t) + a - b).square().mean()

    for alpha, name, known in ((0.5, "", fisher(drawn()[1])),
                               (1.0, " with the law of x_t held fixed", fisher(drawn()[1].detach()))):
        apart = difference(gradient(loss(alpha), student), gradient(known / 2, student))
        yield Check(f"expected gradient at alpha = {alpha:g} against half of the Fisher divergence's{name}; relative",
                    apart, 1e-9)
    known = fisher(drawn()[1]).item()
    far = largest(*(abs(loss(alpha).item() - (1 - alpha) * known) for alpha in (0.5, 1.0, 1.2)))
    yield Check("expected loss against 1 - alpha times the Fisher divergence, over the divergence", far / known, 1e-9)


# -- guidance ----------------------------------------------------------------------------------------------------------

def guidances(problem: Problem) -> Iterator[Check]:
    """A student that draws as the teacher guided at some scale, with the critic that is fitted to it at kappa_1.

    Without a prompt both are the teacher; with one, the critic lies 1 / kappa_1 times as far from there as the student.
    """
    batch, step, null = problem.batch(COUNT, data=False), problem.step(COUNT), problem.means[1]
    own = Affine(problem.schedule, torch.zeros(problem.dim).double().requires_grad_(),
                 torch.linalg.cholesky(problem.covariance).requires_grad_())
    drawing = FunctionRole(problem.schedule, lambda x_t, t, cond: cond.text + own(x_t, t, cond).x0)
    fitted = lambda scale, kappa_1: (Stretched(drawing, null, scale), Stretched(problem.teacher, null, scale / kappa_1))
    worst = 0.0
    for kappa_1, kappa_2 in ((problem.w, problem.w), (1.0, problem.w), (-1.0, -1.0),
                             (problem.uniform(1.2, 4.0), problem.uniform(1.2, 4.0))):
        scale, kappas = problem.w * kappa_1 / kappa_2, {"critic_training_guidance": kappa_1, "critic_guidance": kappa_2}
        rest, usual = (gradient(made(problem, *fitted(at, kappa_1), **kappas).student_loss(batch, step)["identity"],
                                own).norm()
                       for at in (scale, scale + 0.5))
        worst = largest(worst, (rest / usual).item())
    yield Check("gradient at the teacher's law guided at w kappa_1 / kappa_2: at w, unguided, at w with -1, "
                "at another; over that 0.5 higher", worst, 1e-9)
    yield text_free(problem)
    student, critic = fitted(scale, kappa_1)
    pupil, batch = OffsetRole(critic, MANY, problem.dim), problem.batch(MANY, data=False)
    method, step = made(problem, student, pupil, **kappas), problem.step(MANY, "critic")
    loss, cond = method.critic_loss(batch,
                                    step)["denoising"], batch.cond.dropped(step.uniform("drop") < method.settings.drop)
    x, t = student(step.normal("start", batch.shape), torch.ones(MANY),
                   cond).x0.detach(), method.level(step.uniform("t"))
    known = error(guided(pupil, kappa_1), x, step.normal("noise", batch.shape), t, cond, problem.kind).mean()
    yield from pupil.checks(loss, known)


def text_free(problem: Problem) -> Check:
    """Zero-CFG: a critic that knows the student's samples and no prompt, beside an unguided teacher. Of samples of one
    prompt it is their law."""
    batch, step = problem.batch(COUNT, data=False), problem.step(COUNT)
    chosen = Settings(critic_training_guidance=0.0)

    def slope(away: float) -> tuple[float, float]:
        """Its norm where the student's mean is `away`, and how far from no prompt the critic was told."""
        mean = problem.means[0] + away
        deviation = torch.linalg.cholesky(problem.covariance).requires_grad_()
        student = Affine(problem.schedule, mean.clone().requires_grad_(), deviation)
        law = problem.law(problem.covariance, mean)
        critic = FunctionRole(problem.schedule, lambda x, t, cond: law(x, t, cond).x0, problem.kind)
        roles = {"teacher": problem.teacher, "student": student, "critic": critic}
        method = SiD(chosen, roles, 1.0, problem.sampler(SiD.inference(chosen, 1, problem.schedule)))
        norm = gradient(method.student_loss(batch, step)["identity"], student).norm().item()
        return norm, largest(*((cond.text - problem.means[1]).abs().max().item() for *_, cond in critic.calls))

    (rest, told), (usual, _) = slope(0.0), slope(0.5)
    return Check("Zero-CFG: gradient at the unguided teacher's law over that 0.5 beside, and the critic's "
                 "prompts from none",
                 largest(rest / usual, told), 1e-5)
