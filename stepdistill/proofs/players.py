"""Two players in closed form: what a loss teaches a critic, sample by sample, and what a student answers within a
rollout."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.draws import Step
from ..diffusion.prediction import Prediction, truth
from ..diffusion.sampler import Sampler
from ..diffusion.schedule import Schedule
from ..methods.base import Method
from .problem import Affine, Check, FunctionRole, Problem, condition_error, difference, largest, off_law, off_zero

MANY = 2_000


@dataclass
class OffsetRole:
    """A role whose raw output at each of `count` samples may move by an affine of its own, a + b x_t, which is zero.

    a (count, D) and b (count, D, D) take gradients. A guided call holds every sample twice, and moves both alike.
    """

    role: Role
    count: int
    dim: int
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.a = torch.zeros(self.count, self.dim, dtype=torch.float64, requires_grad=True)
        self.b = torch.zeros(self.count, self.dim, self.dim, dtype=torch.float64, requires_grad=True)

    @property
    def schedule(self) -> Schedule:
        return self.role.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        prediction, each = self.role(x_t, t, cond), torch.arange(len(x_t)) % self.count
        moved = self.a[each] + torch.einsum("nij,nj->ni", self.b[each], x_t.double())
        return replace(prediction, raw=prediction.raw + moved)

    def slopes(self, loss: Tensor) -> Tensor:
        """Of a loss in the numbers of each sample, (count, D + D D)."""
        return torch.cat([g.flatten(1) for g in torch.autograd.grad(loss, (self.a, self.b))], 1)

    def checks(self, loss: Tensor, known: Tensor) -> Iterator[Check]:
        """Of a critic's loss, where it should be `known` and the pupil's role is its optimum."""
        found = self.slopes(loss)
        yield Check("slope of the critic's loss in what it says of each sample, against the known one; relative",
                    difference(found, self.slopes(known)), 1e-5)
        yield Check("its mean at the exact denoiser, in standard errors", off_zero(found), 6)


def error(role: Role, x: Tensor, eps: Tensor, t: Tensor, cond: Condition, kind: str) -> Tensor:
    """Mean squared over a sample, (B,), of what a role says of x_t in the view `kind`."""
    prediction = role(role.schedule.add_noise(x, eps, t), t, cond).view(kind)
    return (prediction - truth(x, eps, t, role.schedule, kind)).square().mean(1)


@torch.no_grad()
def simulated(student: Affine, sampler: Sampler, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """The states (B, D) that the student is asked about at the exit, and the law of what it answers: mean,
    covariance."""
    dim, (m, S) = len(student.m), (student.m, student.S)
    x, mean, covariance = step.normal("start", (dim,)).double(), torch.zeros(dim).double(), torch.eye(dim).double()
    for i in range(int(step.shared("exit") * sampler.nfe)):
        landing = torch.tensor([sampler.evaluations[i].landing], dtype=torch.float64)
        alpha, sigma = student.schedule.alpha(landing), student.schedule.sigma(landing)
        x = alpha * (m + x @ S.T) + sigma * step.normal(f"renoise {i}", (dim,)).double()
        mean, covariance = alpha * (m + S @ mean), alpha**2 * S @ covariance @ S.T + sigma**2 * torch.eye(dim)
    return x, m + S @ mean, S @ covariance @ S.T


def role_inputs(problem: Problem, made: Callable[[Role, Role], Method], matched: Tensor,
                trained: Tensor, steps: int = 1,
          shares: bool = True, drop: float = 0.0) -> Iterator[Check]:
    """What the players of made(student, critic) are told.

    matched, trained (M,): equally likely times of the networks in the student's loss and in the critic's. shares:
    whether the critic sees the student's own sample; drop: of the prompts in its loss.
    """
    student, critic = (FunctionRole(problem.schedule, lambda x, t, cond: x / 2) for _ in range(2))
    method, batch = made(student, critic), replace(problem.paired(MANY), cond=problem.prompts(MANY))
    times, prompts, levels = [], [], ([], [])
    for first in exits(problem, MANY, steps):
        second = problem.step(MANY, "critic", index=first.index, kept=first.kept if shares else {})
        for loss, step, share, into in zip((method.student_loss, method.critic_loss), (first, second),
                                           (0.0, drop), levels):
            student.calls.clear(), critic.calls.clear()
            loss(batch, step)
            times += [(t - 1 + i % steps / steps).abs().max().item() for i, (_, t, _) in enumerate(student.calls)]
            prompts.append(condition_error([cond for *_, cond in student.calls + critic.calls],
                                           batch.cond.dropped(step.uniform("drop") < share)))
            into += [t[-MANY:] for _, t, _ in critic.calls]
    yield Check("times that the student is told from those of even steps", largest(*times), 1e-12)
    yield Check("prompts that both are told from the batch's, but those that are to be dropped", largest(*prompts), 0)
    yield Check("moments of the noise levels, the student's and the critic's, against their laws', in standard errors",
                largest(*(off_law(torch.cat(found), law) for found, law in zip(levels, (matched, trained)))), 6)


def exits(problem: Problem, count: int, nfe: int) -> list[Step]:
    """A moment for every exit of a rollout, in their order."""
    moments, index = {}, 0
    while len(moments) < nfe:
        step = problem.step(count, index=index)
        moments.setdefault(int(step.shared("exit") * nfe), step)
        index += 1
    return [moments[exit] for exit in range(nfe)]
