"""Trajectory Consistency Distillation. Zheng et al. 2024, arXiv:2402.19159, algorithm 1 and, at inference, 4.

    t      <- a node of the grid, s <- `skip` nodes nearer to the data, r <- a node from the data up to s
    x_t    <- noise the data to t
    x_s    <- one DDIM step of the guided teacher from x_t to s
    loss   =  d( G(x_t, t -> r), target(x_s, s -> r) )
    target <- running average of the student        (an adapter: the student itself, gradient stopped)

G is one DDIM step of the predicted x_0, which equals the paper's first-order exponential integrator, TCF(1): it is x_s
itself where r = s. The network does not read r. It is sampled by stepping past the next time, to 1 - gamma of it, and
adding fresh noise. A rectified flow, which the paper does not treat, has no stock scheduler for a gamma between 0 and
1.

Sources of the defaults: (p) the paper, (s) diffusers' scripts train_lcm_distill_*, (c) a community's training of TCD,
since the authors released none.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.bridges import bridge
from ...diffusion.consistency import origin
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import flow_map
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, VariancePreserving
from ...diffusion.solvers import ddim
from ...diffusion.times import discrete
from ...diffusion.triples import among, below, grid
from ...losses.regression import DistanceName, distance
from ..base import Follows, Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check, check_fit


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 50               # grid of the teacher's solver; on a VP teacher it must divide 1000 (p, c: 50)
    skip: int = 1                 # nodes between t and s: 1 of 50 is 20 of 1000 times (p, c: 20)
    gamma: float = 0.2            # share of fresh noise at inference, the call's `eta` (p); on a flow 0 or 1
    loss: DistanceName = "squared"     # d, or "huber" (p, c)
    huber_c: float = 0.001        # c of the pseudo-Huber loss (s, c)
    target_decay: float = 0.95    # of the target per update, where all weights are trained (c)
    shift: float = 1.0            # of the nodes of a flow towards noise; large pictures want more (Stable Diffusion 3:
                                  # 3)

    def __post_init__(self) -> None:
        check(self)
        if not 0 <= self.gamma <= 1:
            raise ValueError("gamma must be from 0, no fresh noise, to 1, as a consistency model is sampled; found "
                             f"{self.gamma}")


class TCD(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = roles["teacher"], roles["student"]
        self.target = roles.get("target", self.student)
        self.distance = distance(settings.loss, settings.huber_c)
        self.end = origin(self.student.schedule)           # where the sampler's last step lands
        self.grid = grid(settings.nodes, settings.shift, self.end)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        needs: dict[str, Need] = {"teacher": Frozen(), "student": Trained("teacher")}
        return needs | {"target": Follows("student", settings.target_decay)} if full else needs

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        check_fit("tcd", settings, steps, schedule)
        if not isinstance(schedule, VariancePreserving) and settings.gamma not in (0, 1):
            raise ValueError("no stock scheduler of a flow adds a share of fresh noise: tcd wants settings.gamma: 0, "
                             f"none, or 1, all of it; found {settings.gamma:g}")
        return Inference(steps, noise=settings.gamma, nodes=settings.nodes, end=origin(schedule), shift=settings.shift)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t, s, r = self.times(step)
        x_t = self.student.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            x_s = bridge(ddim, guided(self.teacher, drawn(self.guidance, step)), x_t, t, s, batch.cond)
            target = flow_map(self.target, x_s, s, r, batch.cond)
        return {"consistency": self.distance(flow_map(self.student, x_t, t, r, batch.cond), target).mean()}

    def times(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """t uniform on the nodes above `end`, s `skip` nodes below or `end`, r uniform on the nodes of [end, s]: (B,)
        float64."""
        t = discrete(self.grid[1:])(step.uniform("node"))
        s = below(t, self.grid, self.settings.skip)
        return t, s, among(self.grid, self.grid[:1], s, step.uniform("landing"))
