"""Consistency Models, distilled. Song et al. 2023, arXiv:2303.01469, algorithm 2.

    t > s  <- neighbours on the grid of Karras et al.
    x_t    <- noise the data to t
    x_s    <- one Heun step of the teacher from x_t to s        (two evaluations)
    loss   =  d( f(x_t, t), target(x_s, s) )                    with f(x, origin) = x by construction
    target <- running average of the student, gradient stopped

The paper's f and its sampler run by EDM's clock, which no latent pipeline keeps. Here f is what LCMScheduler and
FlowMatchLCMScheduler sample, with their own boundary, and the times at which they ask the student are nodes of the grid
too. The paper's third distance, LPIPS, judges pixels: d compares latents.

Sources of the defaults: (p) the paper's table of hyperparameters, (r) the released training on ImageNet 64, (l) the
scripts that train LCMs.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.bridges import bridge
from ...diffusion.consistency import consistency, origin
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, VariancePreserving
from ...diffusion.solvers import heun
from ...diffusion.times import LEVELS, discrete, karras
from ...diffusion.triples import below
from ...losses.regression import DistanceName, distance
from ..base import Follows, Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check

SIGMAS = (0.002, 80.0)            # ends of the grid in sigma / alpha, where the schedule reaches so far (p)


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 40               # of the teacher's grid (p, r: 40; 18 for CIFAR-10)
    loss: DistanceName = "squared"     # d, or "huber" (r: the better one is LPIPS)
    huber_c: float = 0.001        # c of the pseudo-Huber loss (l)
    target_decay: float = 0.95    # of the target per update (p, r: 0.95; 0 for CIFAR-10)

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ValueError(f"nodes must be at least 2, the ends of one step; found {self.nodes}")
        check(self)


class CD(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.target = (roles[name] for name in ("teacher", "student", "target"))
        self.distance = distance(settings.loss, settings.huber_c)
        self.grid = grid(self.teacher.schedule, settings.nodes, sampler.times)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "target": Follows("student", settings.target_decay)}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps, noise=1.0)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t = discrete(self.grid[:-1])(step.uniform("node"))
        s = below(t, self.grid.flip(0))
        x_t = self.student.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            x_s = bridge(heun, guided(self.teacher, drawn(self.guidance, step)), x_t, t, s, batch.cond)
            target = consistency(self.target(x_s, s, batch.cond))
        return {"consistency": self.distance(consistency(self.student(x_t, t, batch.cond)), target).mean()}


def grid(schedule: Schedule, count: int, sampled: Tensor) -> Tensor:
    """Times, descending from pure noise to `origin`: `count` of Karras et al. 2022, eq. 5, where a network knows them,
    and those at which the student is asked."""
    low, high = schedule.angle(torch.tensor([1 / LEVELS, 1.0], dtype=torch.float64)).tan().tolist()
    times = karras(schedule, count, max(SIGMAS[0], low), min(SIGMAS[1], high))
    known = (LEVELS * times).round() / LEVELS if isinstance(schedule, VariancePreserving) else times
    return torch.cat([known, sampled, torch.tensor([origin(schedule)], dtype=torch.float64)]).unique().flip(0)
