"""Rectified Flow: reflow and its distillation. Liu et al. 2022, arXiv:2209.03003, algorithm 1; InstaFlow:
arXiv:2309.06380.

    once       noise e -> the teacher's picture y, by a deterministic solver, and kept      (data.pairs)
    t, x_t  <- a uniform place on the straight line between e and y
    loss    =  | velocity of the student at x_t - velocity of the line |^2

A student that follows the lines needs few steps. `distil` asks it at the times of its own sampler alone, t = 1 for one
step, which is how the papers end, from a student that was rectified before. There they measure LPIPS, of decoded
pictures; it wants torchvision, which nothing here depends on, and so "squared" (theirs too) or a pseudo-Huber distance
stands for it.

The straight line of a network of any schedule is the way of DDIM that goes on believing in y, from e at t = 1: x_0 and
eps are constant along it, alpha + sigma scales it to a flow's, and DDIM is exact on it whatever its number of steps.
Where the noise at t = 1 still holds a share of x_0, as Stable Diffusion's does, eps is (e - alpha_1 y) / sigma_1 rather
than e: it is e that the sampler starts from. Guidance is the pairs' own: the student reads no scale.

Source of the defaults: (r) the released training, whose t is 1 - t here.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import ddim_step
from ...diffusion.prediction import Prediction
from ...diffusion.schedule import RectifiedFlow, Schedule
from ...diffusion.times import Law, discrete, levels, uniform
from ...losses.regression import DistanceName, distance
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check


@dataclass(frozen=True, kw_only=True)
class Settings:
    distil: bool = False                             # at the sampler's own times alone
    loss: DistanceName = "squared"                   # of velocities, or "huber" (r; LPIPS for distil)
    huber_c: float = 0.001                           # c of the pseudo-Huber loss

    def __post_init__(self) -> None:
        check(self)


class Reflow(Method):
    Settings = Settings
    data = ("pairs",)

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.student = roles["student"]
        self.time = discrete(sampler.times) if settings.distil else along(self.student.schedule)
        self.distance = distance(settings.loss, settings.huber_c)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t, start = self.time(step.uniform("t")), torch.ones(len(batch), dtype=torch.float64)
        line = Prediction(batch.x0, batch.pairs.noise, start, self.student.schedule, "x0")
        found = self.student(ddim_step(line, t), t, batch.cond)
        return {"velocity": self.distance(found.eps - found.x0, line.eps - line.x0).mean()}


def along(schedule: Schedule) -> Law:
    """Uniform on the straight lines: in a flow's own time, from the first time of a stock scheduler (r: 1e-3 of a flow)
    to 1."""
    flow, ends = RectifiedFlow(), torch.stack([levels()[0], torch.ones((), dtype=torch.float64)])
    place = uniform(*flow.time_at(schedule.angle(ends)).tolist())
    return lambda u: schedule.time_at(flow.angle(place(u)))
