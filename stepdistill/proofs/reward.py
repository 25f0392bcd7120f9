"""Reward feedback: where it rests, which samples a margin leaves alone, and whom gradients reach."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.contracts import Batch, Role
from ..methods.hybrid.reward import RewardFeedback, Settings
from .paths import elsewhere
from .paths_reward import paths
from .problem import (
    Affine,
    Check,
    FunctionRole,
    Problem,
    condition_error,
    difference,
    gradient,
    largest,
    off_law,
    reaching,
)

COUNT, MANY, STEPS = 256, 200, 4


class Linear:
    """Pictures are G x of the sample, and R = a p, with the prompts that it was told."""

    def __init__(self, problem: Problem) -> None:
        self.G, self.a, self.told = problem.normal(3, problem.dim), problem.normal(3), []

    def decode(self, x: Tensor) -> Tensor:
        return x @ self.G.to(x).T

    def reward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        self.told.append(prompts)
        return pixels @ self.a.to(pixels)

    @property
    def slope(self) -> Tensor:
        """Of R in the sample, (D,)."""
        return self.a @ self.G


def made(problem: Problem, judge: Linear, student: Role, begun: Role, steps: int = 1, **settings) -> RewardFeedback:
    chosen = Settings(**settings)
    roles = {"student": student, "begun": begun, "decode": judge.decode, "reward": judge.reward}
    sampler = problem.sampler(RewardFeedback.inference(chosen, steps, problem.schedule))
    return RewardFeedback(chosen, roles, 1.0, sampler)


def moved(student: Affine, by: Tensor) -> Affine:
    """One whose x_0 is that of the student, and `by` beside it."""
    return Affine(student.schedule, (student.m + by).detach().requires_grad_(), student.S.detach().requires_grad_())


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from elsewhere(problem, closed_forms)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    judge, begun = Linear(problem), problem.affine()
    yield from rest(problem, judge, begun)
    yield from margin(problem, judge, begun)
    yield from exits(problem, judge)


def prompted(problem: Problem, count: int) -> Batch:
    texts = [f"{i}" for i in range(count)]
    return replace(problem.batch(count, data=False), cond=problem.prompts(count), prompts=texts)


def rest(problem: Problem, judge: Linear, begun: Affine) -> Iterator[Check]:
    """Of a linear reward w R - n |x - x'|^2 / D is largest at x = x' + w D / (2 n) dR/dx, for every noise alike."""
    batch, step, w, n = prompted(problem, COUNT), problem.step(COUNT), 0.7, 1.9
    by = w * problem.dim / (2 * n) * judge.slope
    slopes, losses = [], []
    for student in (moved(begun, 0 * by), moved(begun, by)):
        found = made(problem, judge, student, begun, weight=w, nearness=n).loss(batch, step)
        slopes.append(gradient(sum(found.values()), student))
        losses.append({name: value.item() for name, value in found.items()})
        yield Check("gradient that reaches the student as it began", reaching(sum(made(
            problem, judge, student, begun).loss(batch, step).values()), begun), 0)
    z = step.normal("start", batch.shape).double()
    known = -w * torch.cat([judge.slope, torch.outer(judge.slope, z.mean(0)).flatten()])
    yield Check("gradient where the student is as it began, against that of the reward alone; relative",
                largest(difference(slopes[0], known), losses[0]["nearness"]), 1e-6)
    yield Check("gradient where every sample is moved by w D / 2 n of the reward's slope, over that",
                (slopes[1].norm() / slopes[0].norm()).item(), 1e-6)
    gained = (losses[0]["reward"] - losses[1]["reward"]) / w
    yield Check("by how much the mean reward is higher there, against w D / 2 n of the slope's square; relative",
                abs(gained / (by @ judge.slope).item() - 1), 1e-6)


def margin(problem: Problem, judge: Linear, begun: Affine) -> Iterator[Check]:
    """A margin between the two middle rewards leaves one half of the samples alone."""
    batch, step, student = prompted(problem, COUNT), problem.step(COUNT), moved(begun, 0 * judge.slope)
    z = step.normal("start", batch.shape).double()
    score = ((student.m + z @ student.S.T) @ judge.slope).detach()
    middle = score.sort().values[COUNT // 2 - 1:COUNT // 2 + 1].mean().item()
    below = (score < middle).double()
    found = gradient(made(problem, judge, student, begun, margin=middle).loss(batch, step)["reward"], student)
    pull = -below[:, None] * judge.slope / COUNT
    yield Check("gradient under a margin against that of the samples below it; relative",
                difference(found, torch.cat([pull.sum(0), (pull.T @ z).flatten()])), 1e-5)
    above = made(problem, judge, student, begun, margin=score.min().item() - 1.0).loss(batch, step)
    yield Check("loss, and gradient, under a margin that all have reached", largest(
        above["reward"].item(), gradient(sum(above.values()), student).abs().max().item()), 1e-9)


def exits(problem: Problem, judge: Linear) -> Iterator[Check]:
    """At which evaluations x_0 is judged, of how many, and what roles and reward are told."""
    batch, times, conditions, asked, one = prompted(problem, 8), [], [], [], problem.affine()
    for index in range(MANY):
        student, begun = (FunctionRole(problem.schedule, lambda x, t, cond: one.m + x.double() @ one.S.T,
                                       problem.kind)
                          for _ in range(2))
        made(problem, judge, student, begun, STEPS, last=2).loss(batch, problem.step(8, index=index))
        (_, t, _), = begun.calls
        times.append(t[0])
        asked.append(len(student.calls) - (STEPS - STEPS * t[0].item() + 1))
        conditions += [cond for _, _, cond in (*student.calls, *begun.calls)]
    yield Check("moments of the times that are judged, of the last two, against the uniform law's, in standard errors",
                off_law(torch.stack(times), torch.tensor([1, 2], dtype=torch.float64) / STEPS), 6)
    yield Check("evaluations of the student beside those up to the one that is judged",
                largest(*(abs(more) for more in asked)), 1e-6)
    yield Check("the prompts of both students from the batch's", condition_error(conditions, batch.cond), 0)
    yield Check("prompts that the reward is told, and are not the batch's",
                sum(told != batch.prompts for told in judge.told if len(told) == len(batch)), 0)
