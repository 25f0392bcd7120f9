"""DisBack: Distribution Backtracking Distillation. Zhang et al. 2024, arXiv:2408.15991.

    recording, while the student stays as the teacher began it:
        critic   <- denoise the student's samples; now and then it is recorded
    backtracking, with the last record as the real score, then the one before, and at last the teacher:
        student  <- x + (real score - fake score)
        critic   <- denoise the student's samples

A student that begins far from the teacher's law is shown scores where the teacher knows none. The records lie on the
way between both laws, so each is sound where the student then is. They are copies of the critic that stand still from
their moment on, as light as it is where it is an adapter, and are saved with it.

Source of the defaults: (c) the authors' released training of SDXL, which has DMD2's discriminator beside, begins with a
student of DMD2, and records every 100 of 1000 steps. As released, its loop takes one record and stays with it; the
paper's moves on at every interval. A record was never trained without its prompt, so its guidance is a guess:
`record_guidance: 1` leaves it out, as it must be where the teacher is the student of a stage before, whose guidance the
records have within.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...diffusion.contracts import Batch, Role
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.rollout import rollout
from ...diffusion.schedule import Schedule
from ...diffusion.times import NoiseLaw
from ...diffusion.weighting import dmd
from ...losses.matching import denoising, distribution_matching
from ..base import (
    Follows,
    Frozen,
    Guidance,
    Inference,
    Losses,
    Method,
    Need,
    Trained,
    Update,
    check_noise,
    noise_levels,
    renoising,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    records: int = 9                   # of the critic, between the teacher and where recording ends (c)
    record_every: int = 100            # training steps from one to the next, and from the last to the end (c)
    interval: int = 1000               # training steps for which each is the real score (c)
    record_guidance: float | None = None    # guidance scale of a record; None: the teacher's (c)
    critic_steps: int = 5              # critic updates a step (c: in recording 1)
    noise_law: NoiseLaw = "uniform"    # of the levels at which scores are matched and the critic is trained: uniform,
                                       # lognormal, shifted, mixture (c)
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those at which the scores are matched (c)
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1
    start_time: float | None = None    # at which the student begins, with unit noise; None: t = 1

    def __post_init__(self) -> None:
        check_noise(self)
        for name in ("record_every", "interval"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1; found {vars(self)[name]}")
        if self.record_guidance is not None and self.record_guidance < 1:
            raise ValueError("record_guidance must be a scale of guidance, at least 1 (1 is none); found "
                             f"{self.record_guidance}")

    @property
    def recording(self) -> int:
        """Training steps before the student moves."""
        return (self.records + 1) * self.record_every

    @property
    def names(self) -> list[str]:
        """Of the records, in the order in which they are made."""
        return [f"record{i}" for i in range(1, self.records + 1)]


class DisBack(Method):
    Settings = Settings
    data = ("prompts", "images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.records, self.schedule = [roles[name] for name in settings.names], self.teacher.schedule
        self.matched, self.trained = (noise_levels(settings, self.schedule, whole) for whole in (False, True))

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        records = {name: Follows("critic", 0.0, until=(i + 1) * settings.record_every)
                   for i, name in enumerate(settings.names)}
        return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher"), **records}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps != 1:
            raise ValueError(f"disback makes one-step students, found {steps} steps: dmd2 and tdm make few-step ones")
        return renoising(settings, steps)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.student_loss, since=self.settings.recording),
                Update(("critic",), self.critic_loss, repeat=self.settings.critic_steps, shares=1)]

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        step.kept["sample"] = x.detach()
        t = self.matched(step.uniform("t"))
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, step.normal("noise", batch.shape), t)
            real, fake = self.real(step)(x_t, t, batch.cond).x0, self.critic(x_t, t, batch.cond).x0
        return {"matching": distribution_matching(x, real, fake, dmd(x.detach(), real)).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        x = step.kept.get("sample")
        if x is None:
            with torch.no_grad():
                x = rollout(self.sampler, self.student, batch.cond, step, batch.shape)
        t, eps = self.trained(step.uniform("t")), step.normal("noise", batch.shape)
        return {"denoising": denoising(self.critic(self.schedule.add_noise(x, eps, t), t, batch.cond), x, eps).mean()}

    def real(self, step: Step) -> Role:
        """Whose score is the real one now: the records from the last to the first, then the teacher."""
        passed, w = max(step.index - self.settings.recording, 0) // self.settings.interval, drawn(self.guidance, step)
        if passed >= len(self.records):
            return guided(self.teacher, w)
        own = self.settings.record_guidance
        return guided(self.records[-1 - passed], w if own is None else own)
