"""TRACT: Transitive Closure Time-Distillation. Berthelot et al. 2023, arXiv:2303.04248, algorithm 2 with DDIM.

    [0, 1] is cut into as many segments as the student has steps, and each into nodes, the teacher's steps
    t        <- a node, s <- the node below it, r <- the end of its segment
    x_t      <- noise the data to t
    x_s      <- one DDIM step of the teacher from x_t to s
    x_r      <- one step of the target from x_s to r; x_s itself where s is r
    loss     =  max(SNR, 1) | x_0 of the student - the x_0 whose step from x_t lands on x_r |^2
    target   <- running average of the student

It is one phase of the paper's: there the student of 32 steps that 1024 nodes make is the teacher of the next, whose 32
nodes make a student of one or two. The paper's teachers are unguided; here the teacher's own step is guided.

Source of the defaults: (r) the released training of variance-preserving teachers, of EDM's where it says so.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.bridges import anchored, bridge
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import flow_map, secant_target
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, like
from ...diffusion.solvers import ddim
from ...diffusion.times import discrete
from ...diffusion.triples import below, grid
from ...diffusion.weighting import truncated_snr
from ...losses.regression import squared
from ..base import Follows, Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 40                # the teacher's DDIM steps; the student's must divide them (r: 1024, then 32; 40 of
                                   # EDM)
    target_decay: float = 0.5      # of the target per update; nearer to 1, the end of a segment is slow to reach its
                                   # start (r)

    def __post_init__(self) -> None:
        check(self)


class TRACT(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.target = (roles[name] for name in ("teacher", "student", "target"))
        self.schedule, self.grid, self.edges = self.student.schedule, grid(settings.nodes), grid(sampler.nfe)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "target": Follows("student", settings.target_decay)}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps < 1 or settings.nodes % steps:
            raise ValueError(f"tract cuts its nodes, {settings.nodes}, into one segment a step: {steps} steps want a "
                             f"multiple of {steps}")
        return Inference(steps)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t, s, r = self.times(step)
        x_t = self.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            x_s = bridge(ddim, guided(self.teacher, drawn(self.guidance, step)), x_t, t, s, batch.cond)
            x_r = anchored(lambda x, u: flow_map(self.target, x, u, r, batch.cond), x_s, s, t, s > r)
            aim = secant_target(x_t, x_r, t, r, self.schedule)
        apart = squared(self.student(x_t, t, batch.cond).x0, aim)
        return {"closure": (like(truncated_snr(self.schedule, t), apart) * apart).mean()}

    def times(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """t uniform on the nodes above 0, s the node below, r the end of the segment: (B,) float64."""
        t = discrete(self.grid[1:])(step.uniform("node"))
        return t, below(t, self.grid), below(t, self.edges)
