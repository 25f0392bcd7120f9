"""Paths of boot: its loss written out."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .path_rows import Cast, rows
from .paths_flow_map import flow_map_sample
from .problem import Check, Problem


def boot_loss(found: Cast) -> Tensor:
    """The student's signal at one node, against that of where the teacher's steps lead from its own at the node
    above."""
    hand, n, count = found.hand, found.settings.nodes, found.settings.solver_steps
    i, e = found.step.integers("node", n) + 1, found.step.normal("start", found.batch.shape).double()
    t, s = i.double() / n, (i - 1).double() / n
    one, told = torch.ones_like(t), lambda r: found.batch.cond.replace(r=r)
    with torch.no_grad():
        x = hand.land(found.learner.x0(e, one, told(t)), e, one, t)
        for k in range(count):
            x = hand.ddim(x, t + (s - t) * k / count, t + (s - t) * (k + 1) / count, found.mean)
        aim = hand.secant(e, x, one, s)
    return (found.learner.x0(e, one, told(s)) - aim).square().mean()


def boot(problem: Problem) -> Iterator[Check]:
    yield from rows("boot", problem, boot_loss, flow_map_sample, 1e-8)
