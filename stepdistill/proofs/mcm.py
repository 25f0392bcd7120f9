"""MCM: without given-back variance the fixed point is the teacher's own DDIM steps to each segment's start, and it
samples so; with one node a segment, on the data's path, it is denoising."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ..diffusion.contracts import Role
from ..methods.consistency.mcm import MCM, Settings
from .paths_mcm import mcm as paths
from .problem import Check, Problem, difference, gradient
from .trajectory import Trajectory, ddim_factor

COUNT, NODES, STEPS = 256, 40, 4


def made(problem: Problem, student: Role, w: float, steps: int = STEPS, **settings) -> MCM:
    chosen = Settings(**{"first_nodes": NODES, "last_nodes": NODES, "eta": 0.0, **settings})
    sampler = problem.sampler(MCM.inference(chosen, steps, problem.schedule, w))
    return MCM(chosen, {"teacher": problem.teacher, "student": student}, w, sampler)


def identities(problem: Problem) -> Iterator[Check]:
    batch, step, noise = problem.batch(COUNT), problem.step(COUNT), problem.normal(COUNT, problem.dim)
    path = Trajectory.of(problem, torch.linspace(1, 0, NODES + 1, dtype=torch.float64), ddim_factor)
    for steps in (1, STEPS):
        student = path.segmented(steps)
        usual = made(problem, path.segmented(2 * steps), problem.w, steps).student_loss(batch, step)["consistency"]
        rest = made(problem, student, problem.w, steps).student_loss(batch, step)["consistency"]
        yield Check(f"{steps}-step loss at the guided teacher's DDIM steps, over that at twice the segments",
                    (rest / usual).item(), 1e-8)
        found = made(problem, student, problem.w, steps).sampler(student, noise, batch.cond)
        whole = path.carried(noise, torch.ones(COUNT, dtype=torch.float64), torch.zeros(COUNT, dtype=torch.float64))
        yield Check(f"its sample in {steps} steps against the teacher's in {NODES}; relative",
                    difference(found, whole), 1e-9)

    learner = problem.affine()
    network = learner.as_network(problem.kind)
    method = made(problem, network, 1.0, NODES, bridge="data", loss="squared")
    t = (step.integers("node", NODES) + 1).double() / NODES
    x_t = problem.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
    weight = 1 + (problem.schedule.alpha(t) / problem.schedule.sigma(t)) ** 2
    error = weight[:, None] * (learner(x_t, t, batch.cond).x0 - batch.x0).square()
    found = gradient(method.student_loss(batch, step)["consistency"], learner)
    yield Check("gradient of a node a segment on the data's path against that of denoising, weighted SNR + 1; relative",
                difference(found, gradient(error.mean(), learner)), 1e-9)
    yield from paths(problem)
