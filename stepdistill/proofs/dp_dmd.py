"""DP-DMD: the first step is taught where the guided teacher's steps arrive, and by nothing else; a student on the
teacher's trajectory is at rest, and its critic at the guided teacher."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.flow_map import secant_target
from ..methods.distribution.dp_dmd import DPDMD, Settings
from .paths import elsewhere
from .paths_dp_dmd import paths
from .players import OffsetRole, role_inputs
from .problem import Check, FunctionRole, Problem, difference, gradient, off_zero, stock_times
from .tdm import on_trajectory
from .trajectory import Trajectory, ddim_factor

COUNT, MANY, STEPS = 256, 5_000, 4


def made(problem: Problem, student: Role, critic: Role, steps: int = STEPS, **settings) -> DPDMD:
    chosen = Settings(**settings)
    roles = {"teacher": problem.teacher, "student": student, "critic": critic}
    return DPDMD(chosen, roles, problem.w, problem.sampler(DPDMD.inference(chosen, steps, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    yield taught(problem)
    yield from apart(problem)
    yield from at_rest(problem)
    yield from role_inputs(problem, lambda student, critic: made(problem, student, critic, noise_law="uniform"),
                           stock_times(), stock_times(), STEPS, shares=False)


def taught(problem: Problem) -> Check:
    """DDIM of a Gaussian is affine in the state: 5 of 30 steps, u -> 3 u / (1 + 2 u)."""
    student, batch, step = problem.affine(), problem.batch(COUNT, data=False), problem.step(COUNT)
    even = 1 - torch.arange(6, dtype=torch.float64) / 30
    times, noise = 3 * even / (1 + 2 * even), step.normal("start", batch.shape).double()
    start, end = (times[i].expand(COUNT) for i in (0, -1))
    arrived = Trajectory.of(problem, times, ddim_factor).carried(noise, start, end)
    target = secant_target(noise, arrived, start, end, problem.schedule)
    right = gradient(0.05 * (student(noise, start, batch.cond).x0 - target).square().mean(), student)
    found = made(problem, student, problem.teacher).student_loss(batch, step)["diversity"]
    return Check("gradient of the first step's distance against that to the teacher's steps in closed form; relative",
                 difference(gradient(found, student), right), 1e-5)


def apart(problem: Problem) -> Iterator[Check]:
    """A student whose first step and whose others have numbers of their own."""
    first, others = (torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    student = FunctionRole(problem.schedule, lambda x, t, cond: torch.where(t[:, None] > 0.99, first, others) * x / 2)
    batch, method = problem.batch(COUNT, data=False), made(problem, student, problem.teacher)
    losses = method.student_loss(batch, problem.step(COUNT))
    slopes = {name: torch.stack(torch.autograd.grad(loss, (first, others), retain_graph=True)).abs()
              for name, loss in losses.items()}
    yield Check("what matching teaches the first step, and its distance the others, over what they teach their own",
                torch.stack([slopes["matching"][0] / slopes["matching"][1],
                             slopes["diversity"][1] / slopes["diversity"][0]]).max().item(), 0)


def at_rest(problem: Problem) -> Iterator[Check]:
    """The samples of `on_trajectory` have the guided teacher's law."""
    off = torch.zeros(problem.dim, dtype=torch.float64, requires_grad=True)
    guided = problem.law(problem.covariance, problem.guided_cond(1, problem.w).text[0])
    exact = on_trajectory(problem, STEPS, off)
    batch, pupil = problem.batch(MANY, data=False), OffsetRole(guided, MANY, problem.dim)
    loss = made(problem, exact, pupil).critic_loss(batch, problem.step(MANY, "critic"))["denoising"]
    yield Check("slope of a critic of its samples at the guided teacher, in standard errors",
                off_zero(pupil.slopes(loss)), 6)

    def slope(critic: Role) -> Tensor:
        losses = made(problem, exact, critic).student_loss(batch, problem.step(MANY))
        return torch.autograd.grad(losses["matching"], off)[0].norm()
    yield Check("student's gradient there, over that with another critic",
                (slope(guided) / slope(FunctionRole(problem.schedule, far))).item(), 1e-5)


def far(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    return x + 1
