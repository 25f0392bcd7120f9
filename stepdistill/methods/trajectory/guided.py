"""On Distillation of Guided Diffusion Models, its first stage. Meng et al. 2023, arXiv:2210.03142, algorithm 1.

    t, w  <- any time, and a guidance scale of the range for each sample
    x_t   <- noise the data to t
    loss  =  max(SNR, 1) | student(x_t, t, w) - guided teacher(x_t, t, w) |^2

One evaluation of the student then does what two of the teacher do, at every scale of the range. The second stage is
`progressive` with teacher: previous, which halves the steps at all scales at once. The paper's scale of s is 1 + s
here, where 1 is conditional only. A student without a guidance embedding learns one scale by heart: give a single one.

Sources of the defaults: (p) the paper.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided, with_scale
from ...diffusion.schedule import Schedule, like
from ...diffusion.times import discrete, levels
from ...diffusion.weighting import snr_plus_one, truncated_snr
from ...losses.regression import squared
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, middle


@dataclass(frozen=True, kw_only=True)
class Settings:
    weight: Literal["truncated", "v"] = "truncated"   # of the error in x_0: max(SNR, 1), or SNR + 1 (p: truncated)
    guidance_embedding: bool = True    # the student reads the guidance scale (p)

    def __post_init__(self) -> None:
        if self.weight not in ("truncated", "v"):
            raise ValueError(f"weight must be 'truncated' or 'v'; found {self.weight!r}")


class GuidedDistillation(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = roles["teacher"], roles["student"]
        self.schedule, self.time = self.student.schedule, discrete(levels())
        self.weight = {"truncated": truncated_snr, "v": snr_plus_one}[settings.weight]

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher", reads=("w",) * settings.guidance_embedding)}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps, guidance=middle(guidance) if settings.guidance_embedding else None, exact_grid=False)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t, w = self.time(step.uniform("t")), drawn(self.guidance, step)
        x_t = self.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            target = guided(self.teacher, w)(x_t, t, batch.cond).x0
        cond = with_scale(batch.cond, w) if self.settings.guidance_embedding else batch.cond
        error = squared(self.student(x_t, t, cond).x0, target)
        return {"guided": (like(self.weight(self.schedule, t), error) * error).mean()}
