"""Reward Feedback Learning, for few-step students. Xu et al. 2023, arXiv:2304.05977; of Hyper-SD, arXiv:2404.13686,
section 3.2, and of MLCM's later version, arXiv:2406.05768, the stage after consistency.

    i        <- one of the `last` evaluations of the student's own sampler
    x_t      <- unit noise, through the evaluations before it; no gradients
    x        <- the student's x_0 at x_t; gradients flow through this evaluation alone
    student  <- relu(margin - reward(decode(x), prompt)); + nearness | x - x_0 at x_t of the student as it began |^2

No teacher is asked and no data are seen. A stage of it goes on with the student of the stage before, any method's, and
is sampled as that one. An x_0 is a sample at the last evaluation, and of a consistency model at any; a student of
segments or of DDIM's steps wants `last: 1`, which is DRaFT-1 (Clark et al. 2023, arXiv:2309.17400).

What a reward raises without an end it overdoes. The published trainings stop early, lower the rate, or go on with their
denoising loss on data; here the student stays near to what it was, which at one noise level is the KL divergence of
DPOK (Fan et al. 2023, arXiv:2305.16381, eq. 5) up to its weight.

Sources of the defaults: (c) the released training of the first paper; the weights are ours, since under Adam that of
one term alone says nothing.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.rollout import renoising
from ...diffusion.schedule import Schedule
from ...losses.regression import squared
from ..base import Codec, Follows, Guidance, Inference, Losses, Method, Need, Reward, Trained, Update


@dataclass(frozen=True, kw_only=True)
class Settings:
    last: int = 1                      # evaluations, the last so many, at which x_0 may be judged; all of them where
                                       # there are fewer (c: 10 of 40)
    margin: float | None = None        # the reward from which on a sample is good enough; None: there is none, and the
                                       # mean is raised (c: 2 of ImageReward; MLCM: 16 of MPS)
    weight: float = 1.0                # of the reward (c: 1e-3, alone)
    nearness: float = 1.0              # of staying near to the student as it began; 0 leaves it out (c)
    fresh: bool = False                # a student without a stage before, such as a LoRA that is given, is sampled with
                                       # fresh noise in each step, as a consistency model, rather than by DDIM

    def __post_init__(self) -> None:
        if self.last < 1 or self.weight <= 0 or self.nearness < 0:
            raise ValueError("last must be at least 1, weight above 0 and nearness at least 0; found "
                             f"{self.last}, {self.weight:g}, {self.nearness:g}")


class RewardFeedback(Method):
    Settings = Settings
    data = ("prompts", "images", "samples")
    as_before = True

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.student, self.begun = roles["student"], roles.get("begun")
        self.decode, self.reward = roles["decode"], roles["reward"]

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        begun: dict[str, Need] = {"begun": Follows("student", 0.0, until=0)} if settings.nearness else {}
        return {"student": Trained("teacher"), **begun, "decode": Codec(), "reward": Reward()}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps, noise=float(settings.fresh))

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        s, sampler, start = self.settings, self.sampler, step.normal("start", batch.shape)
        last = min(s.last, sampler.nfe)
        exit = sampler.nfe - 1 - int(step.shared("exit") * last)
        with torch.no_grad():
            x_t = sampler.rollout(self.student, start, exit, batch.cond, renoising(step, batch.shape))
        here = torch.full((len(batch),), exit)
        x = sampler.predict(self.student, x_t, here, batch.cond).x0
        score = self.reward(self.decode(x), batch.prompts)
        short = -score if s.margin is None else F.relu(s.margin - score)
        losses = {"reward": s.weight * short.mean()}
        if self.begun is None:
            return losses
        with torch.no_grad():
            before = sampler.predict(self.begun, x_t, here, batch.cond).x0
        return losses | {"nearness": s.nearness * squared(x, before).mean()}
