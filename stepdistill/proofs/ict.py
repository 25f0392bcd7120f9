"""iCT: on average over the noise, its fixed point is the product of the DDIM steps that the data's own teacher would
make; what it asks twice it asks under one dropout."""
from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..methods.consistency.ict import ICT, Settings, grid
from .paths_ict import ict as paths
from .problem import Check, FunctionRole, Problem, difference, off_zero
from .trajectory import Trajectory, bent, ddim_factor

COUNT, MANY, NODES, STEPS = 256, 40_000, 12, 2


def made(problem: Problem, student: Role, steps: int = STEPS, **settings) -> ICT:
    chosen = Settings(**{"first_nodes": NODES, "last_nodes": NODES, **settings})
    return ICT(chosen, {"student": student}, 1.0, problem.sampler(ICT.inference(chosen, steps, problem.schedule)))


def pulls(problem: Problem, student: Role) -> Tensor:
    """Slopes of the loss in each sample's own additions, (B, 2 D): c is so large that the distance is the mean
    square."""
    add, times = (torch.zeros(MANY, problem.dim, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = made(problem, bent(student, add, times), huber_c=1e4).loss(problem.batch(MANY),
                                                                      problem.step(MANY))["consistency"]
    return torch.cat(torch.autograd.grad(loss, (add, times)), 1)


def identities(problem: Problem) -> Iterator[Check]:
    data = copy(problem)
    data.w = 1.0                                        # nothing guides the law of the data
    sampler = made(data, data.teacher).sampler
    path = Trajectory.of(data, grid(data.schedule, NODES, sampler.times).flip(0), ddim_factor)
    student = path.consistent()
    yield Check("mean slopes where it knows the product of the data's DDIM steps, in standard errors",
                off_zero(pulls(data, student)), 6)

    batch, noise, begin = data.batch(COUNT), data.normal(COUNT, data.dim), torch.ones(COUNT, dtype=torch.float64)
    known = path.carried(noise, begin, path.grid[-1].expand(COUNT))
    found = made(data, student, 1).sampler(student, noise, batch.cond)
    yield Check("one step of the stock sampler against all those steps; relative", difference(found, known), 1e-9)

    masks: list[Tensor] = []

    def dropping(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        masks.append(torch.rand(x.shape) < 0.5)
        return masks[-1] * x
    method = made(data, FunctionRole(data.schedule, dropping))
    for index in (0, 1):
        method.loss(batch, data.step(COUNT, index=index))
    unlike = (masks[0] != masks[1]).sum() + (masks[2] != masks[3]).sum()
    yield Check("units dropped in one of the two passes alone", unlike.item(), 0)
    yield Check("share of units dropped alike at two steps, from a half",
                abs((masks[0] == masks[2]).double().mean().item() - 0.5), 0.1)
    yield from paths(problem)
