"""Knowledge Distillation in Iterative Generative Models. Luhman & Luhman 2021, arXiv:2101.02388, eq. 11.

    once       noise -> the teacher's picture, by a deterministic solver, and kept          (data.pairs)
    one step   loss = d( x_0 of the student at the noise, the picture )

With more steps, which the paper does not treat, the kept states of the teacher's way are where the student's steps are
to land, each step by itself:

    j       <- one of the student's k steps
    loss    =  d( the student's DDIM step from node j, node j + 1 )        nodes at t = 1, 1 - 1/k .. 0

Its optimum is `secant_target`, the one x_0 whose step lands there; on a flow d is 1 / k^2 of the velocity's loss.
Guidance is the pairs' own: the student reads no scale, and of a range the pairs have the middle.

Sources of the defaults: (p) the paper, (r) the released training.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import flow_map
from ...diffusion.schedule import Schedule
from ...losses.regression import absolute, squared
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update


@dataclass(frozen=True, kw_only=True)
class Settings:
    loss: Literal["squared", "absolute"] = "squared"      # d (p; r: absolute for CIFAR-10, squared for the rest)

    def __post_init__(self) -> None:
        if self.loss not in ("squared", "absolute"):
            raise ValueError(f"loss must be 'squared' or 'absolute'; found {self.loss!r}")


class KD(Method):
    Settings = Settings
    data = ("pairs",)

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.student, self.steps = roles["student"], sampler.nfe
        self.distance = {"squared": squared, "absolute": absolute}[settings.loss]

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher")}

    @classmethod
    def waypoints(cls, settings: Settings, steps: int) -> int:
        return steps

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        x_t, x_r, t, r = batch.pairs.leg(step.integers("leg", self.steps), self.steps)
        return {"regression": self.distance(flow_map(self.student, x_t, t, r, batch.cond), x_r).mean()}
