"""SnapFusion: its step distillation, which keeps classifier-free guidance. Li et al. 2023, arXiv:2306.00980, section 4.

    t, m, r <- a step of the student's own sampler, and the time between
    w       <- in a share of the steps a guidance scale of the range for each sample, else 1
    target  <- the x_0 whose single DDIM step from x_t lands where two of the teacher's land, guided at w
    loss    =  max(SNR, 1) | student guided at w (x_t, t) - target |^2
               + denoising_weight max(SNR, 1) | student(x_t, t) - x_0 of the data |^2

Where `progressive` puts the guidance within, here both sides are guided from without: the student goes on answering to
no prompt, is sampled by a pipeline that guides it, at two evaluations a step and at any scale of the range, and teaches
the next stage so. Steps without guidance teach the answers to the data's own captions, and those to no prompt where
data.caption_dropout takes captions away. The middle of the range is what leaves in the call.

Sources of the defaults: (2) a re-implementation by others, the loss with it: the paper has no training code; (u)
figures of the paper that were not checked against any code.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.bridges import two_in_one
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, like
from ...diffusion.weighting import snr_plus_one, truncated_snr
from ...losses.regression import squared
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check_halving, halving, middle


@dataclass(frozen=True, kw_only=True)
class Settings:
    guided_share: float = 0.1          # of the steps whose student and teacher are guided: more follows the prompt
                                       # closer, at less diversity (u)
    denoising_weight: float = 0.2      # of the data's own x_0; 0 leaves it out (u; 2: 1)
    weight: Literal["truncated", "v"] = "truncated"   # of errors in x_0: max(SNR, 1), or SNR + 1 (u; 2: v)

    def __post_init__(self) -> None:
        if not 0 <= self.guided_share <= 1 or self.denoising_weight < 0:
            raise ValueError("guided_share is from 0 to 1, denoising_weight not negative; found "
                             f"{self.guided_share}, {self.denoising_weight}")
        if self.weight not in ("truncated", "v"):
            raise ValueError(f"weight must be 'truncated' or 'v'; found {self.weight!r}")


class SnapFusion(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = roles["teacher"], roles["student"]
        self.schedule = self.student.schedule
        self.grid = sampler.doubled(self.schedule)
        self.weight = {"truncated": truncated_snr, "v": snr_plus_one}[settings.weight]

    @classmethod
    def succession(cls, steps: int, before: int) -> str | None:
        return halving("snapfusion", steps, before)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(within=False), "student": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        check_halving("snapfusion", steps, schedule)
        return Inference(steps, cfg=middle(guidance), exact_grid=False)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        i = step.integers("step", self.sampler.nfe)
        t, m, r = (self.grid[2 * i + j] for j in range(3))
        x_t = self.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        w = drawn(self.guidance, step) if step.shared("guided") < self.settings.guided_share else 1.0
        with torch.no_grad():
            target = two_in_one(guided(self.teacher, w), x_t, t, m, r, batch.cond)
        student = guided(self.student, w)
        found = student(x_t, t, batch.cond).x0
        losses = {"distillation": self.error(found, target, t)}
        if self.settings.denoising_weight:
            plain = found if student is self.student else self.student(x_t, t, batch.cond).x0
            losses["denoising"] = self.settings.denoising_weight * self.error(plain, batch.x0, t)
        return losses

    def error(self, x0: Tensor, aim: Tensor, t: Tensor) -> Tensor:
        """A scalar."""
        apart = squared(x0, aim)
        return (like(self.weight(self.schedule, t), apart) * apart).mean()
