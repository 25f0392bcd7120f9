"""LCM: the loss vanishes at the product of the teacher's DDIM steps, and its target is held fixed."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ..diffusion.contracts import Role
from ..methods.consistency.lcm import LCM, Settings
from .followers import following
from .paths_consistency import lcm as paths
from .problem import Check, FunctionRole, Problem, difference, gradient
from .trajectory import Trajectory, ddim_factor

COUNT, NODES = 256, 10


def made(problem: Problem, student: Role, nodes: int = NODES, **roles: Role) -> LCM:
    settings = Settings(nodes=nodes, loss="squared")
    sampler = problem.sampler(LCM.inference(settings, 1, problem.schedule, problem.w))
    return LCM(settings, {"teacher": problem.teacher, "student": student} | roles, problem.w, sampler)


def identities(problem: Problem) -> Iterator[Check]:
    batch, step = problem.batch(COUNT), problem.step(COUNT)
    path = Trajectory.of(problem, torch.linspace(1, 0, NODES + 1, dtype=torch.float64), ddim_factor)
    method = made(problem, student := path.consistent())
    root = method.loss(batch, step)["consistency"].sqrt()
    yield Check("root of the loss at the product of the guided teacher's DDIM steps", root.item(), 1e-9)

    rubbish = FunctionRole(problem.schedule, lambda x, t, cond: 1e3 * x, problem.kind)
    once = Trajectory.of(problem, torch.tensor([1.0, 0.0], dtype=torch.float64), ddim_factor)
    root = made(problem, once.consistent(), 1, target=rubbish).loss(batch, step)["consistency"].sqrt()
    yield Check("the same where every step ends at 0, whatever the target says: it is x there", root.item(), 1e-9)

    noise = problem.normal(COUNT, problem.dim)
    t, end = (torch.full((COUNT,), u, dtype=torch.float64) for u in (1.0, 0.0))
    found = method.sampler(student, noise, batch.cond)
    yield Check("one step of the stock sampler against all the steps; relative",
                difference(found, path.carried(noise, t, end)), 1e-9)

    learner, other, i = problem.affine(), problem.affine(), step.integers("node", NODES)
    network = learner.as_network(problem.kind)
    for label, role, method in (("itself, fixed", learner, made(problem, network)),
                               ("an average", other, made(problem, network, target=other.as_network(problem.kind)))):
        found = gradient(method.loss(batch, step)["consistency"], learner)
        known = path.consistency_gradient(learner, batch, step, (i + 1).double() / NODES, i.double() / NODES, role)
        yield Check(f"gradient against that with an exact target, {label}; relative", difference(found, known), 1e-9)
    yield from paths(problem)
    yield from following("lcm", problem)
