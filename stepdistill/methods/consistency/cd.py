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
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.consistency import consistency, origin
from ...diffusion.contracts import Batch, Condition, Role
from ...diffusion.draws import Step
from ...diffusion.flow_map import ddim_step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, VariancePreserving, like
from ...diffusion.solvers import heun_step
from ...diffusion.times import LEVELS, karras
from ...losses.regression import pseudo_huber, squared
from ..base import Follows, Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update

SIGMAS = (0.002, 80.0)            # ends of the grid in sigma / alpha, where the schedule reaches so far (p)


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 40               # of the teacher's grid (p, r: 40; 18 for CIFAR-10)
    loss: Literal["squared", "huber"] = "squared"     # d (r: the better one is LPIPS)
    huber_c: float = 0.001        # c of the pseudo-Huber loss (l)
    target_decay: float = 0.95    # of the target per update (p, r: 0.95; 0 for CIFAR-10)

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ValueError(f"nodes must be at least 2, the ends of one step; found {self.nodes}")
        if self.loss not in ("squared", "huber"):
            raise ValueError(f"loss must be 'squared' or 'huber'; found {self.loss!r}")
        if self.huber_c <= 0 or not 0 <= self.target_decay < 1:
            raise ValueError(f"huber_c must be above 0 and target_decay in [0, 1); found {self.huber_c}, "
                             f"{self.target_decay}")


class CD(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.target = (roles[name] for name in ("teacher", "student", "target"))
        self.distance = {"huber": partial(pseudo_huber, c=settings.huber_c), "squared": squared}[settings.loss]
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
        i = step.integers("node", len(self.grid) - 1)
        t, s = self.grid[i], self.grid[i + 1]
        x_t = self.student.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            x_s = bridge(guided(self.teacher, drawn(self.guidance, step)), x_t, t, s, batch.cond)
            target = consistency(self.target(x_s, s, batch.cond))
        return {"consistency": self.distance(consistency(self.student(x_t, t, batch.cond)), target).mean()}


def grid(schedule: Schedule, count: int, sampled: Tensor) -> Tensor:
    """Times, descending from pure noise to `origin`: `count` of Karras et al. 2022, eq. 5, where a network knows them,
    and those at which the student is asked."""
    low, high = schedule.angle(torch.tensor([1 / LEVELS, 1.0], dtype=torch.float64)).tan().tolist()
    times = karras(schedule, count, max(SIGMAS[0], low), min(SIGMAS[1], high))
    known = (LEVELS * times).round() / LEVELS if isinstance(schedule, VariancePreserving) else times
    return torch.cat([known, sampled, torch.tensor([origin(schedule)], dtype=torch.float64)]).unique().flip(0)


def bridge(teacher: Role, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
    """Heun's step from t to s; DDIM's, which is Euler's, to t = 0, where Heun's rule is not defined."""
    here = teacher(x_t, t, cond)
    x_s = ddim_step(here, s)
    inner = s > 0
    there = teacher(x_s, torch.where(inner, s, t), cond)
    return torch.where(like(inner, x_s) > 0, heun_step(here, there), x_s)
