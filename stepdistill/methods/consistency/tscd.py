"""Trajectory Segmented Consistency Distillation, of Hyper-SD. Ren et al. 2024, arXiv:2404.13686, section 3.1.

    [0, 1] is cut into as many segments as the student has steps
    t        <- a node of the teacher's grid, s <- the node below it, r <- a node from the start of t's segment up to s
    x_t      <- noise the data to t
    x_s      <- one DDIM step of the guided teacher from x_t to s
    x_r      <- one DDIM step of the student from x_t to r
    target   <- one DDIM step of the student from x_s to r, gradient stopped; x_s itself where s is r
    student  <- | x_r - target |^2, and fool the discriminator
    critic and its heads  <- tell target from x_r, both noised from r to one place of the segment

Stages merge the segments, 8 -> 4 -> 2 -> 1, each begun with the student of the one before: {steps: [8, 4, 2, 1]}. As
target and step draw apart, the discriminator takes over from the mean squares: early stages want gan_weight: 0. The
student is sampled by DDIM, and only with as many steps as it has segments. The network does not read r, so over a
whole segment it learns a mean over the places to land on; `landing: start` trains the one where it is sampled to land.

The paper's reward tuning and its score distillation are stages of their own, see reward and dmd2; the recipes `hyper`
have all three, and end with one student of 1 to 8 steps. Its discriminator is that of SDXL-Lightning: a trained copy of
the teacher, whose features heads read.

Source of the defaults: (c) a community's training, without the discriminator; the authors released none, and the paper
gives no weights.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.bridges import anchored, bridge
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import flow_map
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule
from ...diffusion.solvers import ddim
from ...diffusion.times import LEVELS, discrete, levels
from ...diffusion.triples import above, among, below, grid
from ...losses.adversarial import discriminator_loss, generator_loss
from ...losses.regression import squared
from ..base import Frozen, Guidance, Heads, Inference, Losses, Method, Need, Trained, Update, check


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 40                # steps of the teacher's grid, a multiple of the segments (c: 50, which 8 do not
                                   # divide)
    landing: Literal["uniform", "start"] = "uniform"    # r: any node from the start of the segment to s, or its start
                                                        # (c: uniform)
    mse_weight: float = 1.0        # of the mean squares: less of it where segments are long
    gan_weight: float = 0.1        # of fooling the discriminator: more of it where they are long; 0 leaves it out

    def __post_init__(self) -> None:
        check(self)
        if self.landing not in ("uniform", "start"):
            raise ValueError(f"landing must be 'uniform' or 'start'; found {self.landing!r}")
        if min(self.mse_weight, self.gan_weight) < 0 or not self.mse_weight + self.gan_weight:
            raise ValueError("mse_weight and gan_weight must not be negative, and one of them above 0; found "
                             f"{self.mse_weight:g}, {self.gan_weight:g}")


class TSCD(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.discriminator = roles["teacher"], roles["student"], roles.get("discriminator")
        self.schedule, self.edges, self.grid = self.student.schedule, grid(sampler.nfe), grid(settings.nodes)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        needs: dict[str, Need] = {"teacher": Frozen(), "student": Trained("teacher")}
        game: dict[str, Need] = {"critic": Trained("teacher"), "discriminator": Heads("critic")}
        return needs | (game if settings.gan_weight else {})

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps < 1 or settings.nodes % steps:
            near = ", ".join(str(n) for n in range(1, settings.nodes + 1) if settings.nodes % n == 0)
            raise ValueError(f"tscd cuts its nodes, {settings.nodes}, into one segment a step: {steps} steps want a "
                             f"multiple of {steps} as nodes, and {settings.nodes} nodes one of {near} as steps")
        return Inference(steps)

    def updates(self) -> list[Update]:
        game = [Update(("critic", "discriminator"), self.critic_loss, shares=1)] if self.discriminator else []
        return [Update(("student",), self.student_loss), *game]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        t, s, r = self.times(step)
        x_t = self.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            x_s = bridge(ddim, guided(self.teacher, drawn(self.guidance, step)), x_t, t, s, batch.cond)
            target = anchored(lambda x, u: flow_map(self.student, x, u, r, batch.cond), x_s, s, t, s > r)
        x_r = flow_map(self.student, x_t, t, r, batch.cond)
        losses = {"consistency": self.settings.mse_weight * squared(x_r, target).mean()}
        if self.discriminator is None:
            return losses
        step.kept.update(real=target, fake=x_r.detach(), r=r)
        return losses | {"gan": self.settings.gan_weight * generator_loss(self.logits(x_r, r, batch, step)).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        real, fake = (self.logits(step.kept[name], step.kept["r"], batch, step) for name in ("real", "fake"))
        return {"discriminator": discriminator_loss(real, fake).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """t uniform on the nodes above 0, s the node below, r a node of its segment up to s, or the segment's start:
        (B,) float64."""
        t = discrete(self.grid[1:])(step.uniform("node"))
        s, start = below(t, self.grid), below(t, self.edges)
        return t, s, start if self.settings.landing == "start" else among(self.grid, start, s, step.uniform("landing"))

    def logits(self, x_r: Tensor, r: Tensor, batch: Batch, step: Step) -> Tensor:
        """Logits (B, K) of a state at r, noised to a time from there to the end of the segment, which is not among
        them."""
        end = above(r, self.edges) - 1 / LEVELS
        judged = among(levels(), r, end, step.uniform("judged t"))
        noised = self.schedule.renoise(x_r, step.normal("judged noise", batch.shape), r, judged)
        return self.discriminator(noised, judged, batch.cond)
