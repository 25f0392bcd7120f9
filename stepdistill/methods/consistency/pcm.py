"""Phased Consistency Model. Wang et al. 2024, arXiv:2405.18407, algorithm 1.

    [0, 1] is cut into as many phases as the student has steps
    t              <- a node of the teacher's grid, s <- the node below it, r <- the start of its phase
    x_t            <- noise the data to t
    x_s            <- one DDIM step of the guided teacher from x_t to s
    target         <- one DDIM step of the student from x_s to r, gradient stopped; x_s itself where s is r
    student        <- d( its DDIM step from x_t to r, target ), and fool the heads on it
    discriminator  <- heads on the frozen teacher's features tell target from step at each of their positions, both
                      noised from r to one place of the phase

Both that the heads are shown have been through the student, so they ask for consistency and no more: no real picture
is seen. The student is sampled by DDIM, and only with as many steps as it has phases. The released training cuts at
the nearest node of 50, and samples at even times; here the cuts are even, and nodes too.

Source of the defaults: (c) the authors' released training.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu

from ...diffusion.bridges import anchored, bridge
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import flow_map
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule
from ...diffusion.solvers import ddim
from ...diffusion.times import LEVELS, discrete, levels
from ...diffusion.triples import above, among, below, grid
from ...losses.adversarial import hinge_discriminator_loss, over_tokens
from ...losses.regression import DistanceName, distance
from ..base import Frozen, Guidance, Heads, Inference, Losses, Method, Need, Trained, Update, check


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 50                # steps of the teacher's grid (c: 50; 40 for SDXL, 100 for Stable Diffusion 3)
    loss: DistanceName = "huber"   # d, or "squared" (c)
    huber_c: float = 0.001         # c of the pseudo-Huber loss (c)
    gan_weight: float = 0.1        # of fooling the heads; 0 leaves them out (c)

    def __post_init__(self) -> None:
        check(self)


class PCM(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.discriminator = roles["teacher"], roles["student"], roles.get("discriminator")
        self.schedule, self.edges = self.student.schedule, grid(sampler.nfe)
        self.grid = torch.cat([grid(settings.nodes), self.edges]).unique()
        self.distance = distance(settings.loss, settings.huber_c)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        needs: dict[str, Need] = {"teacher": Frozen(), "student": Trained("teacher")}
        return needs | ({"discriminator": Heads("teacher", kind="tokens")} if settings.gan_weight else {})

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if not 1 <= steps <= settings.nodes:
            raise ValueError(f"pcm wants at least one node a phase: with nodes = {settings.nodes} 1 to "
                             f"{settings.nodes} steps; found {steps}")
        return Inference(steps)

    def updates(self) -> list[Update]:
        heads = [Update(("discriminator",), self.critic_loss, shares=1)] if self.discriminator else []
        return [Update(("student",), self.student_loss), *heads]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        t, s, r = self.times(step)
        x_t = self.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            x_s = bridge(ddim, guided(self.teacher, drawn(self.guidance, step)), x_t, t, s, batch.cond)
            target = anchored(lambda x, u: flow_map(self.student, x, u, r, batch.cond), x_s, s, t, s > r)
        x_r = flow_map(self.student, x_t, t, r, batch.cond)
        losses = {"consistency": self.distance(x_r, target).mean()}
        if self.discriminator is None:
            return losses
        step.kept.update(real=target, fake=x_r.detach(), r=r)
        fooled = over_tokens([relu(1 - each) for each in self.logits(x_r, r, batch, step)])
        return losses | {"gan": self.settings.gan_weight * fooled.mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        real, fake = (self.logits(step.kept[name], step.kept["r"], batch, step) for name in ("real", "fake"))
        losses = [hinge_discriminator_loss(*pair) for pair in zip(real, fake, strict=True)]
        return {"discriminator": over_tokens(losses).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """t uniform on the nodes above 0, s the node below, r the start of the phase: (B,) float64."""
        t = discrete(self.grid[1:])(step.uniform("node"))
        return t, below(t, self.grid), below(t, self.edges)

    def logits(self, x_r: Tensor, r: Tensor, batch: Batch, step: Step) -> list[Tensor]:
        """K maps of logits, (B, N) each, of a state at r, noised to a time of the phase that begins there, its end not
        among them."""
        end = above(r, self.edges) - 1 / LEVELS
        judged = among(levels(), r, end, step.uniform("judged t"))
        noised = self.schedule.renoise(x_r, step.normal("judged noise", batch.shape), r, judged)
        return self.discriminator(noised, judged, batch.cond)
