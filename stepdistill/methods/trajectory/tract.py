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

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import ddim_step, flow_map, secant_target
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, like
from ...diffusion.weighting import truncated_snr
from ...losses.regression import squared
from ..base import Follows, Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 40                # the teacher's DDIM steps; the student's must divide them (r: 1024, then 32; 40 of
                                   # EDM)
    target_decay: float = 0.5      # of the target per update; nearer to 1, the end of a segment is slow to reach its
                                   # start (r)

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes must be at least 1; found {self.nodes}")
        if not 0 <= self.target_decay < 1:
            raise ValueError(f"target_decay must be in [0, 1); found {self.target_decay}")


class TRACT(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.target = (roles[name] for name in ("teacher", "student", "target"))
        self.schedule, self.segment = self.student.schedule, settings.nodes // sampler.nfe

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
            x_s = ddim_step(guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond), s)
            inside = s > r
            tail = flow_map(self.target, x_s, torch.where(inside, s, t), r, batch.cond)
            aim = secant_target(x_t, torch.where(like(inside, x_s) > 0, tail, x_s), t, r, self.schedule)
        apart = squared(self.student(x_t, t, batch.cond).x0, aim)
        return {"closure": (like(truncated_snr(self.schedule, t), apart) * apart).mean()}

    # -- terms -----------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """t uniform on the nodes i / N, i = 1 .. N, s the node below, r the end of the segment: (B,) float64. An end
        belongs to the segment below it."""
        i, n = step.integers("node", self.settings.nodes) + 1, self.settings.nodes
        end = (i - 1) // self.segment * self.segment
        return i.double() / n, (i - 1).double() / n, end.double() / n
