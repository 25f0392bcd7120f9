"""PCM: the fixed point is the teacher's own DDIM steps to the start of each phase, it samples so, and there the heads
are shown one thing twice."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Role
from ..methods.consistency.pcm import PCM, Settings
from .paths_pcm import paths
from .problem import Check, Problem, difference, off_law, stock_times
from .trajectory import Trajectory, ddim_factor, start

COUNT, MANY, NODES, STEPS = 256, 5_000, 40, 4


def made(problem: Problem, student: Role, steps: int = STEPS, discriminator: Role | None = None, **settings) -> PCM:
    chosen = Settings(**{"nodes": NODES, "loss": "squared", "gan_weight": 0.1 if discriminator else 0.0, **settings})
    roles = {"teacher": problem.teacher, "student": student}
    sampler = problem.sampler(PCM.inference(chosen, steps, problem.schedule))
    return PCM(chosen, roles | ({"discriminator": discriminator} if discriminator else {}), problem.w, sampler)


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    batch, step, noise = problem.batch(COUNT), problem.step(COUNT), problem.normal(COUNT, problem.dim)
    path = Trajectory.of(problem, torch.linspace(1, 0, NODES + 1, dtype=torch.float64), ddim_factor)
    whole = path.carried(noise, torch.ones(COUNT, dtype=torch.float64), torch.zeros(COUNT, dtype=torch.float64))
    for steps in (1, STEPS):
        student = path.segmented(steps)
        root = made(problem, student, steps).student_loss(batch, step)["consistency"].sqrt()
        yield Check(f"root of the {steps}-phase loss at the guided teacher's DDIM steps", root.item(), 1e-9)
        found = made(problem, student, steps).sampler(student, noise, batch.cond)
        yield Check(f"its sample in {steps} steps against the teacher's in {NODES}; relative",
                    difference(found, whole), 1e-9)
    yield from game(problem, path.segmented(STEPS))


def game(problem: Problem, consistent: Role) -> Iterator[Check]:
    """What the heads are shown, and when. consistent: a student that lands where the teacher does."""
    batch, step = problem.batch(COUNT), problem.step(COUNT)
    shown: list[Tensor] = []
    seen: list[Tensor] = []
    heads = lambda x, t, cond: shown.append(x.detach()) or seen.append(t) or [0 * x[:, :2]]
    method = made(problem, consistent, discriminator=heads)
    losses = method.student_loss(batch, step)
    losses |= method.critic_loss(batch, problem.step(COUNT, "discriminator", kept=step.kept))
    yield Check("what the heads are shown as real and as fake there; relative", difference(shown[1], shown[2]), 1e-7)
    blind = max(abs(losses["gan"].item() - 0.1), abs(losses["discriminator"].item() - 2))
    yield Check("losses where the heads cannot tell, from 0.1 and 2", blind, 1e-9)

    theta = torch.zeros(2, problem.dim, dtype=torch.float64, requires_grad=True)
    seen.clear()
    linear = lambda x, t, cond: seen.append(t) or [x @ theta.T]
    method = made(problem, problem.affine().as_network(problem.kind), discriminator=linear)
    method.student_loss(batch, step)
    critic = problem.step(COUNT, "discriminator", kept=step.kept)
    found, = torch.autograd.grad(method.critic_loss(batch, critic)["discriminator"], theta)
    kept = problem.schedule.alpha(seen[1]) / problem.schedule.alpha(method.times(step)[2])
    known = (kept[:, None] * (step.kept["fake"] - step.kept["real"])).detach().mean(0).expand(2, -1) / 2
    yield Check("heads' slope at logit 0 against fake - real, under one noise; relative",
                difference(found, known), 1e-5)

    seen.clear()
    wide = problem.step(MANY)
    method.student_loss(problem.batch(MANY), wide)
    t, _, r = method.times(wide)
    of_last = r == (STEPS - 1) / STEPS
    law = stock_times(1 - 1 / STEPS) - 1 / 1000
    yield Check("starts of phases against those that hold t", (r - start(t, STEPS)).abs().max().item(), 1e-12)
    yield Check("moments of the times judged, of the noisiest phase, against a uniform law's, in standard errors",
                off_law(seen[0][of_last], law), 6)
