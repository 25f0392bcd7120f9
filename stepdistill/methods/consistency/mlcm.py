"""Multistep Consistency Distillation of Latent Diffusion Model: MLCM, later TLCM. Xie et al. 2024, arXiv:2406.05768.

No data are seen. `stage: segments`, with as many segments of [0, 1] as the student has steps:
    t        <- a node of the teacher's grid, s <- the node below it, r <- the start of its segment
    x_t      <- noise, and the guided teacher's DDIM steps from there to t: the more, the smaller t
    x_s      <- one DDIM step of the guided teacher from x_t
    loss     =  | the student's DDIM step from x_t to r - that from x_s, gradient stopped; x_s itself where s is r |^2
`stage: whole`, afterwards, makes what lies at the ends of segments consistent with one another:
    t        <- one of the `ends`, s <- the one below it
    x_0      <- the student's own sample, all its steps;  x_t <- x_0 noised to t
    x_s      <- `bridge_steps` DDIM steps of the guided teacher from x_t
    loss     =  | the student's x_0 at x_t - that at x_s, gradient stopped; x_s itself where s is 0 |^2

Training is progressive: stages of fewer and fewer segments, then the whole, each begun with the student of the one
before. A student of segments is sampled by DDIM with as many steps; one of the whole as a consistency model is, between
the `ends`, with any number of steps. The later version goes on with a reward (a stage of its own, see reward and the
recipe mlcm-reward), distribution matching and a discriminator (see dmd2), and may measure the distance in features of
a latent LPIPS.

Source of the defaults: (p) the paper's later version, (a) accounts of it, since no training was released.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.bridges import anchored, bridge
from ...diffusion.contracts import Batch, Role
from ...diffusion.draws import Step
from ...diffusion.flow_map import flow_map
from ...diffusion.guidance import drawn, guided
from ...diffusion.rollout import renoising
from ...diffusion.schedule import Schedule, VariancePreserving
from ...diffusion.solvers import ddim
from ...diffusion.times import LEVELS, discrete, even
from ...diffusion.triples import below, grid
from ...losses.regression import squared
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check, check_told


@dataclass(frozen=True, kw_only=True)
class Settings:
    stage: Literal["segments", "whole"] = "segments"
    nodes: int = 40                # segments: steps of the teacher's grid, a multiple of the segments (p: 20 of 1000
                                   # times apart, of which 8 segments hold no whole number)
    state_steps: int = 20          # segments: DDIM steps of the teacher from noise to data, of which states take those
                                   # that lie above t (a: 1 to 20)
    ends: int = 8                  # whole: the ends of as many segments (p)
    bridge_steps: int = 3          # whole: DDIM steps of the teacher from an end to the one below (p)

    def __post_init__(self) -> None:
        check(self)
        if self.stage not in ("segments", "whole"):
            raise ValueError(f"stage must be 'segments' or 'whole'; found {self.stage!r}")


class MLCM(Method):
    Settings = Settings
    data = ("prompts",)

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = roles["teacher"], roles["student"]
        self.schedule, self.by_segments = self.student.schedule, settings.stage == "segments"
        self.grid = grid(settings.nodes if self.by_segments else settings.ends)
        self.edges = grid(sampler.nfe if self.by_segments else 1)
        self.state, self.bridged = ((self.teacher_state, 1) if self.by_segments
                                    else (self.student_state, settings.bridge_steps))

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if settings.stage == "segments":
            if steps < 1 or settings.nodes % steps:
                near = ", ".join(str(n) for n in range(1, settings.nodes + 1) if settings.nodes % n == 0)
                raise ValueError(f"mlcm cuts its nodes, {settings.nodes}, into one segment a step: {steps} steps want "
                                 f"a multiple of {steps} as nodes, and {settings.nodes} nodes one of {near} as steps")
            check_told("mlcm", settings.nodes, schedule)
            return Inference(steps)
        if not 1 <= steps <= settings.ends:
            raise ValueError(f"mlcm of the whole with ends = {settings.ends} serves 1 to {settings.ends} steps; found "
                             f"{steps}")
        if isinstance(schedule, VariancePreserving) and LEVELS % settings.ends:
            raise ValueError(f"mlcm of the whole on a variance-preserving teacher wants ends that divide {LEVELS}, its "
                             f"times; found {settings.ends}")
        check_told("mlcm", settings.ends * settings.bridge_steps, schedule)
        return Inference(steps, noise=1.0, nodes=settings.ends)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t, s, r = self.times(step)
        teacher = guided(self.teacher, drawn(self.guidance, step))
        with torch.no_grad():
            x_t = self.state(teacher, t, batch, step)
            x_s = bridge(ddim, teacher, x_t, t, s, batch.cond, self.bridged)
            target = anchored(lambda x, u: flow_map(self.student, x, u, r, batch.cond), x_s, s, t, s > r)
        return {"consistency": squared(flow_map(self.student, x_t, t, r, batch.cond), target).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """t uniform on the nodes, or the ends, above 0, s the one below, r the start of the segment, of the whole 0:
        (B,) float64."""
        t = discrete(self.grid[1:])(step.uniform("node"))
        return t, below(t, self.grid), below(t, self.edges)

    def teacher_state(self, teacher: Role, t: Tensor, batch: Batch, step: Step) -> Tensor:
        """Where the teacher's steps from noise arrive at t. A sample that has arrived stays there."""
        times = torch.maximum(even(self.settings.state_steps)[:, None], t)
        return ddim(teacher, step.normal("start", batch.shape), times, batch.cond)

    def student_state(self, teacher: Role, t: Tensor, batch: Batch, step: Step) -> Tensor:
        """The student's own sample, noised to t."""
        x0 = self.sampler(self.student, step.normal("start", batch.shape), batch.cond, renoising(step, batch.shape))
        return self.schedule.add_noise(x0, step.normal("noise", batch.shape), t)
