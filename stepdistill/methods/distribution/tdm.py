"""TDM: Trajectory Distribution Matching. Luo et al. 2025, arXiv:2503.06674.

    [0, 1] is cut into as many segments as the student has steps
    states   <- all that the student's own sampler is given on its way, without gradients
    x_0, eps <- what the student says of one of them, drawn; s <- where its step lands
    x_s      <- alpha_s x_0 + sigma_s eps, its own next state
    x_t      <- x_s with fresh noise, t in the segment that s begins
    critic   <- denoise x_t to x_0, each sample under its importance
    student  <- d( x_0, x_0 + (real score - fake score at x_t) ), of one size at all noise levels

x_s is no x_0 under fresh noise, and a critic that is shown it does not learn the score of x_0's law: the importance of
a sample makes up for that. Its exponent is a sum over all numbers of a sample; the released training takes their mean,
which is a temperature of as many, for the exact one has a variance without bound. With `critic_target: state` the
critic learns the law of x_t itself, as in Phased DMD (arXiv:2510.27684), and needs none. At s = 0 both are plain
denoising.

The student is sampled by DDIM, and only with as many steps as it has segments. The released training begins at time 900
of 1000, here all of [0, 1] is used. The paper's student that is told how many steps it is sampled with is left out.

Source of the defaults: (c) the authors' released training and its command.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import ddim_step
from ...diffusion.guidance import drawn, guided
from ...diffusion.rollout import stopped, way
from ...diffusion.schedule import Schedule, like
from ...diffusion.times import LEVELS
from ...diffusion.weighting import dmd, min_snr
from ...losses.matching import from_state, importance
from ...losses.regression import DistanceName, distance, squared
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check

LOWEST, MARGIN = 0.02, 0.01            # t is no lower, and as far from the ends of its segment (c: from the upper one)


@dataclass(frozen=True, kw_only=True)
class Settings:
    critic_steps: int = 1              # critic updates a step, all on one rollout (c)
    critic_target: Literal["x0", "state"] = "x0"    # the student's x_0 under its importance, or the law of x_t (c)
    temperature: float | None = None   # of the importance: 1 is exact; None: how many numbers a sample has (c)
    levels: Literal["segment", "above"] = "segment"    # t is below the segment's end, or below 1 (c)
    random_end: bool = False           # s is anywhere in the segment, rather than where it begins (c)
    loss: DistanceName = "huber"       # d, or "squared" (c)
    huber_c: float = 0.001             # c of the pseudo-Huber loss (c)

    def __post_init__(self) -> None:
        check(self)
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be above 0; found {self.temperature}")
        if self.critic_target not in ("x0", "state") or self.levels not in ("segment", "above"):
            raise ValueError("critic_target must be 'x0' or 'state' and levels 'segment' or 'above'; found "
                             f"{self.critic_target!r}, {self.levels!r}")
        if self.critic_target == "state" and self.temperature is not None:
            raise ValueError(f"temperature is of critic_target x0, with state there is no importance; found "
                             f"{self.temperature}")


class TDM(Method):
    Settings = Settings
    data = ("prompts", "images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.schedule, self.distance = self.teacher.schedule, distance(settings.loss, settings.huber_c)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if not 1 <= steps <= (most := int(1 / (LOWEST + 2 * MARGIN))):
            raise ValueError(f"tdm wants segments with noise levels to draw: 1 to {most} steps; found {steps}")
        return Inference(steps)

    def updates(self) -> list[Update]:
        n = self.settings.critic_steps
        return [Update(("critic",), self.critic_loss, repeat=n, shares=n),
                Update(("student",), self.student_loss, shares=1)]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        if "states" not in step.kept:
            step.kept["states"] = way(self.sampler, self.student, batch.cond, step, batch.shape)
        with torch.no_grad():
            x0, x_s, s, t = self.state(batch, step)
        eps = step.normal("noise", batch.shape)
        x_t = self.schedule.renoise(x_s, eps, s, t)
        if self.settings.critic_target == "x0":
            weight = importance(x_t, x0, eps, t, self.schedule, self.settings.temperature or eps[0].numel())
        else:
            x0, weight = from_state(x_s, eps, s, t, self.schedule)[0], self.fresh(s, t)
        error = squared(self.critic(x_t, t, batch.cond).x0, x0)
        return {"denoising": (like(min_snr(self.schedule, t), error) * like(weight, error) * error).mean()}

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x0, x_s, s, t = self.state(batch, step)
        with torch.no_grad():
            x_t = self.schedule.renoise(x_s, step.normal("noise", batch.shape), s, t)
            real = guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond).x0
            fake = self.critic(x_t, t, batch.cond).x0
            aim, weight = x0 + real - fake, dmd(x0, real)
        return {"matching": (weight * self.distance(x0, aim)).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def state(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The student's x_0 at one of its own states, each as likely, the state x_s that it makes, s, and t."""
        exit = step.integers("exit", self.sampler.nfe)
        p, s = stopped(self.sampler, self.student, batch.cond, step.kept["states"], exit)
        if self.settings.random_end:
            s = s + step.uniform("s") * (p.t - s - 2 * MARGIN)
        return p.x0, ddim_step(p, s), s, self.level(s, p.t, step)

    def level(self, s: Tensor, end: Tensor, step: Step) -> Tensor:
        """t uniform on the stock times from s to the end of the segment, or to 1, but for the margins."""
        end = end if self.settings.levels == "segment" else torch.ones_like(end)
        first, last = (s + MARGIN).clamp(min=LOWEST), end - MARGIN
        first, last = ((LEVELS * u).round() for u in (first, last))
        return (first + (step.uniform("t") * (last - first + 1)).floor()) / LEVELS

    def fresh(self, s: Tensor, t: Tensor) -> Tensor:
        """How much of the variance of x_t's noise came between s and t: the critic's error counts as one in that."""
        kept = self.schedule.alpha(t) / self.schedule.alpha(s) * self.schedule.sigma(s)
        return 1 - (kept / self.schedule.sigma(t)) ** 2
