"""DP-DMD: Diversity-Preserved Distribution Matching Distillation. Wu et al. 2026, arXiv:2602.03139, algorithm 1.

    repeat critic_steps times
        critic  <- denoise the student's samples
    z       <- noise, and `anchor` of the guided teacher's `nodes` steps from it: where they arrive, at t'
    x_0*    <- the one guess whose single step from that noise would arrive at z                            (eq. 6)
    x_1     <- the student's first step from the same noise, through which no gradient comes back
    x       <- the sample that its other steps make of x_1, with gradients through all of them
    student <- x + (real score - fake score);  |the x_0 of its first step - x_0*|^2                         (eq. 8)

The first step settles what a sample will be, and learns it from the teacher's own way, which keeps the samples of a
prompt apart; the others, which the reverse Kullback-Leibler divergence may narrow down, only finish it. On a flow the
distance of the x_0 at t = 1 is that of the velocities, eq. 7; on a variance-preserving schedule it is that of v but for
the share alpha^2 of what the noise holds there.

The released training makes the matching of one size by |x_t - x_0 of the teacher|, here it is DMD's own, |x - x_0|.

Sources of the defaults: (p) the paper, (c) the authors' released training (Stable Diffusion 3.5).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.contracts import Batch, Condition, Role
from ...diffusion.draws import Step
from ...diffusion.flow_map import ddim_step, secant_target
from ...diffusion.guidance import drawn, guided
from ...diffusion.prediction import Prediction
from ...diffusion.schedule import Schedule
from ...diffusion.solvers import ddim
from ...diffusion.times import NoiseLaw
from ...diffusion.triples import grid
from ...diffusion.weighting import dmd
from ...losses.matching import denoising, distribution_matching
from ...losses.regression import squared
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check_noise, noise_levels


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 30                    # steps of the teacher from noise to data (c)
    anchor: int = 5                    # of these, as many as the student's first step is to stand for (p; c: 10)
    diversity_weight: float = 0.05     # of the first step's distance (p)
    critic_steps: int = 5              # critic updates a step (p)
    noise_law: NoiseLaw = "shifted"    # of the levels at which scores are matched and the critic is trained: uniform,
                                       # lognormal, shifted, mixture (c)
    t_range: tuple[float, float] = (0.0, 1.0)      # of these, those at which the scores are matched (c)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted, and of the teacher's steps: towards noise above 1 (c)

    def __post_init__(self) -> None:
        check_noise(self)
        if not 1 <= self.anchor <= self.nodes:
            raise ValueError(f"anchor must be from 1 to nodes = {self.nodes}; found {self.anchor}")
        if self.diversity_weight < 0:
            raise ValueError(f"diversity_weight must be at least 0; found {self.diversity_weight}")


class DPDMD(Method):
    Settings = Settings
    data = ("prompts", "images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.schedule = self.teacher.schedule
        self.matched, self.trained = (noise_levels(settings, self.schedule, whole) for whole in (False, True))
        self.times = grid(settings.nodes, settings.shift).flip(0)[:settings.anchor + 1]     # 1 .. t'

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps < 2:
            raise ValueError(f"dp_dmd matches distributions by the steps after the first, and wants 2 or more; found "
                             f"{steps}")
        return Inference(steps)

    def updates(self) -> list[Update]:
        return [Update(("critic",), self.critic_loss, repeat=self.settings.critic_steps),
                Update(("student",), self.student_loss)]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        with torch.no_grad():
            x = self.sampler(self.student, step.normal("start", batch.shape), batch.cond)
        t, eps = self.trained(step.uniform("t")), step.normal("noise", batch.shape)
        return {"denoising": denoising(self.critic(self.schedule.add_noise(x, eps, t), t, batch.cond), x, eps).mean()}

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        noise, teacher = step.normal("start", batch.shape), guided(self.teacher, drawn(self.guidance, step))
        first = self.says(self.sampler.start * noise, 0, batch.cond)
        x = self.finished(self.landing(first, 0).detach(), batch.cond)
        t = self.matched(step.uniform("t"))
        x_t = self.schedule.add_noise(x.detach(), step.normal("noise", batch.shape), t)
        with torch.no_grad():
            target = self.first_guess(teacher, noise, batch.cond)
            real, fake = teacher(x_t, t, batch.cond).x0, self.critic(x_t, t, batch.cond).x0
        return {"matching": distribution_matching(x, real, fake, dmd(x.detach(), real)).mean(),
                "diversity": self.settings.diversity_weight * squared(first.x0, target).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def first_guess(self, teacher: Role, noise: Tensor, cond: Condition) -> Tensor:
        """The x_0 by which one step from the noise arrives where the teacher's steps to t' do."""
        start, end = (self.times[i].expand(len(noise)) for i in (0, -1))
        return secant_target(noise, ddim(teacher, noise, self.times, cond), start, end, self.schedule)

    def finished(self, x: Tensor, cond: Condition) -> Tensor:
        """The student's sample, by its steps after the first, from where that lands."""
        for i in range(1, self.sampler.nfe):
            x = self.landing(self.says(x, i, cond), i)
        return x

    def says(self, x: Tensor, i: int, cond: Condition) -> Prediction:
        """What the student predicts at evaluation i of its sampler, given x there."""
        return self.sampler.predict(self.student, x, torch.full((len(x),), i), cond)

    def landing(self, prediction: Prediction, i: int) -> Tensor:
        """Where the step of evaluation i takes it."""
        return ddim_step(prediction, self.sampler.landings[i].expand(len(prediction.x_t)))
