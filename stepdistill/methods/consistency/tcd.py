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
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.consistency import origin
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import ddim_step, flow_map
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, VariancePreserving
from ...diffusion.times import LEVELS, shifted, uniform
from ...losses.regression import pseudo_huber, squared
from ..base import Follows, Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 50               # grid of the teacher's solver; on a VP teacher it must divide 1000 (p, c: 50)
    skip: int = 1                 # nodes between t and s: 1 of 50 is 20 of 1000 times (p, c: 20)
    gamma: float = 0.2            # share of fresh noise at inference, the call's `eta` (p); on a flow 0 or 1
    loss: Literal["squared", "huber"] = "squared"     # d (p, c)
    huber_c: float = 0.001        # c of the pseudo-Huber loss (s, c)
    target_decay: float = 0.95    # of the target per update, where all weights are trained (c)
    shift: float = 1.0            # of the nodes of a flow towards noise; large pictures want more (Stable Diffusion 3:
                                  # 3)

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes must be at least 1; found {self.nodes}")
        if not 1 <= self.skip <= self.nodes:
            raise ValueError(f"skip must be from 1 to nodes = {self.nodes}; found {self.skip}")
        if not 0 <= self.gamma <= 1:
            raise ValueError("gamma must be from 0, no fresh noise, to 1, as a consistency model is sampled; found "
                             f"{self.gamma}")
        if self.loss not in ("squared", "huber"):
            raise ValueError(f"loss must be 'squared' or 'huber'; found {self.loss!r}")
        if self.huber_c <= 0 or not 0 <= self.target_decay < 1:
            raise ValueError(f"huber_c must be above 0 and target_decay in [0, 1); found {self.huber_c}, "
                             f"{self.target_decay}")
        if self.shift <= 0:
            raise ValueError(f"shift must be above 0, where 1 leaves the nodes uniform; found {self.shift}")


class TCD(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = roles["teacher"], roles["student"]
        self.target = roles.get("target", self.student)
        self.distance = {"huber": partial(pseudo_huber, c=settings.huber_c), "squared": squared}[settings.loss]
        self.end = origin(self.student.schedule)           # where the sampler's last step lands

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        needs: dict[str, Need] = {"teacher": Frozen(), "student": Trained("teacher")}
        return needs | {"target": Follows("student", settings.target_decay)} if full else needs

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if not 1 <= steps <= settings.nodes:
            raise ValueError(f"tcd with nodes = {settings.nodes} serves 1 to {settings.nodes} steps; found {steps}")
        discrete = isinstance(schedule, VariancePreserving)
        if not discrete and settings.gamma not in (0, 1):
            raise ValueError("no stock scheduler of a flow adds a share of fresh noise: tcd wants settings.gamma: 0, "
                             "none, or 1, all of "
                             f"it; found {settings.gamma:g}")
        if discrete and (LEVELS % settings.nodes or settings.shift != 1):
            raise ValueError(f"tcd on a variance-preserving teacher wants nodes that divide {LEVELS}, its times, and "
                             "no shift; found "
                             f"nodes = {settings.nodes}, shift = {settings.shift}")
        return Inference(steps, noise=settings.gamma, nodes=settings.nodes, end=origin(schedule), shift=settings.shift)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t, s, r = self.times(step)
        x_t = self.student.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            x_s = ddim_step(guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond), s)
            target = flow_map(self.target, x_s, s, r, batch.cond)
        return {"consistency": self.distance(flow_map(self.student, x_t, t, r, batch.cond), target).mean()}

    # -- terms -----------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """t uniform on the nodes i / N, i = 1 .. N, s `skip` nodes below or `end`, r uniform on the nodes of [end,
        s]."""
        i = step.integers("node", self.settings.nodes) + 1
        below = (i - self.settings.skip).clamp_min(0)
        node = shifted(uniform(), self.settings.shift)
        t, s, r = (node(n.double() / self.settings.nodes)
                   for n in (i, below, (step.uniform("landing") * (below + 1)).long()))
        return t, s.clamp_min(self.end), r.clamp_min(self.end)
