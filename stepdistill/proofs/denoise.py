"""Denoising: its fixed point is the denoiser of the data, the least loss is what the noise hides, and all times are
asked alike."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Role
from ..methods.trajectory.denoise import Denoise, Settings
from .paths import elsewhere
from .paths_denoise import paths
from .problem import Check, FunctionRole, Problem, off_law, off_zero, stock_times
from .trajectory import bent

MANY, STEPS = 20_000, 25


def made(problem: Problem, student: Role, **settings) -> Denoise:
    chosen = Settings(**settings)
    return Denoise(chosen, {"student": student}, 1.0,
                   problem.sampler(Denoise.inference(chosen, STEPS, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    batch, step = problem.batch(MANY), problem.step(MANY)
    yield Check("mean slopes at the denoiser of the data's law, in standard errors",
                off_zero(pulls(problem, problem.teacher)), 6)
    asked = FunctionRole(problem.schedule, lambda x, t, cond: problem.teacher(x, t, cond).x0, problem.kind)
    loss = made(problem, asked).loss(batch, step)["denoising"]
    ((_, t, cond),) = asked.calls
    yield Check("moments of the times against the uniform law's, in standard errors", off_law(t, stock_times()), 6)
    yield Check("prompts that the student is not shown", float(cond is not batch.cond), 0)
    hidden = least(problem, stock_times()).mean()
    spread = least(problem, t).std() / MANY**0.5 + (2 / problem.dim) ** 0.5 * hidden / MANY**0.5
    yield Check("loss of the data's denoiser from what the noise hides, in standard errors",
                ((loss - hidden).abs() / spread).item(), 6)


def pulls(problem: Problem, student: Role) -> Tensor:
    """Slopes of the loss in each sample's own additions, (B, 2 D)."""
    add, times = (torch.zeros(MANY, problem.dim, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = made(problem, bent(student, add, times)).loss(problem.batch(MANY), problem.step(MANY))["denoising"]
    return torch.cat(torch.autograd.grad(loss, (add, times)), 1)


def least(problem: Problem, t: Tensor) -> Tensor:
    """The mean over dimensions of E |output - its mean given x_t|^2, (B,): x_0 given x_t has the variance
    (1/c + SNR)^-1 along each axis of variance c, and the output moves with x_0 as `moves` says."""
    alpha, sigma = problem.schedule.alpha(t), problem.schedule.sigma(t)
    moves = {"eps": alpha / sigma, "v": (alpha**2 + sigma**2) / sigma,
             "velocity": problem.schedule.d_sigma(t) * alpha / sigma - problem.schedule.d_alpha(t)}[problem.kind]
    variances, _ = problem.axes
    left = 1 / (1 / variances + (alpha / sigma)[:, None] ** 2)
    return moves**2 * left.mean(1)
