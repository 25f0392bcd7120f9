"""Denoising, the training of diffusion models itself. Ho et al. 2020, arXiv:2006.11239, algorithm 1, L_simple; of flows
Lipman et al. 2022, arXiv:2210.02747.

    t, eps  <- any time, and noise
    x_t     =  alpha_t x_0 + sigma_t eps
    loss    =  | what the network predicts at x_t - what it is to predict of x_0 and eps |^2

No teacher is asked: what is learned is the law of the data, pictures of yours or samples of the pipeline, at all noise
levels. A student of it takes as many steps as any diffusion model. Two things are made so: a LoRA of a style or a
subject, and, of the samples that a few-step model makes in its own few steps, the adapter that gives it its many steps
back (`stepdistill undistil`). `data.caption_dropout` keeps it able to be guided.

Sources of the defaults: (p) the paper, whose times are all alike; of flows SD3's training has `shifted`
(arXiv:2403.03206).
"""
from __future__ import annotations

from dataclasses import dataclass

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.schedule import Schedule
from ...diffusion.times import NoiseLaw
from ...losses.matching import denoising
from ..base import Guidance, Inference, Losses, Method, Need, Trained, Update, check_noise, noise_levels


@dataclass(frozen=True, kw_only=True)
class Settings:
    noise_law: NoiseLaw = "uniform"    # of the noise levels: uniform, lognormal, shifted, mixture (p)
    t_range: tuple[float, float] = (0.0, 1.0)    # of these, those that are trained (p)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1

    def __post_init__(self) -> None:
        check_noise(self)


class Denoise(Method):
    Settings = Settings
    data = ("images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.student, self.schedule = roles["student"], roles["student"].schedule
        self.time = noise_levels(settings, self.schedule)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"student": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps, exact_grid=False)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t, eps = self.time(step.uniform("t")), step.normal("noise", batch.shape)
        x_t = self.schedule.add_noise(batch.x0, eps, t)
        return {"denoising": denoising(self.student(x_t, t, batch.cond), batch.x0, eps).mean()}
