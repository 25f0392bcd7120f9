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

import torch
from torch import Tensor

from ...diffusion.contracts import Batch, Pairs
from ...diffusion.draws import Step
from ...diffusion.flow_map import flow_map
from ...diffusion.schedule import Schedule
from ...errors import RequestError
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
        x_t, x_r, t, r = self.leg(batch.pairs, step)
        return {"regression": self.distance(flow_map(self.student, x_t, t, r, batch.cond), x_r).mean()}

    # -- terms -----------------------------------------------------------------------------------------------------

    def leg(self, pairs: Pairs, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One of the student's steps along each pair: where it begins and is to land, (B, ...), and when, (B,)
        float64."""
        every, left = divmod(pairs.nodes.shape[1], self.steps)
        if left:
            raise RequestError(f"a student of {self.steps} steps lands on {self.steps} evenly spaced states of the "
                               "teacher's way, and "
                               f"the pairs keep {pairs.nodes.shape[1]}: data.pairs.nodes should be a multiple of "
                               f"{self.steps}")
        j, rows = step.integers("leg", self.steps), torch.arange(len(pairs.noise))
        states = torch.cat([pairs.noise[:, None], pairs.nodes[:, every - 1::every].to(pairs.noise)], 1)
        times = torch.cat([torch.ones(len(rows), 1, dtype=torch.float64), pairs.times[:, every - 1::every]], 1)
        return states[rows, j], states[rows, j + 1], times[rows, j], times[rows, j + 1]
