"""Latent Consistency Models. Luo et al. 2023, arXiv:2310.04378, algorithm 1; as a LoRA: arXiv:2311.05556.

    t      <- a node of the grid, s <- `skip` nodes nearer to the data
    x_t    <- noise the data to t
    x_s    <- one DDIM step of the guided teacher from x_t to s
    loss   =  d( f(x_t, t), target(x_s, s) )        with target(x, 0) = x
    target <- running average of the student        (an adapter: the student itself, gradient stopped)

On a rectified flow, which the paper does not treat, the nodes are uniform in t, or shifted, and f is x_0.

`bridge: data` is latent consistency fine-tuning: x_s is made of the x_0 and the noise that made x_t. No teacher is
asked, and nothing is guided: a student that is trained so goes on from one that knows its scales. It follows (a).

Sources of the defaults: (p) the paper, (s) diffusers' scripts train_lcm_distill_*, whose figures differ, (a) accounts
of the paper, whose fine-tuning was not released and not compared with its text.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.bridges import anchored, bridge
from ...diffusion.consistency import consistency
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule
from ...diffusion.solvers import ddim
from ...diffusion.times import discrete
from ...diffusion.triples import below, grid
from ...losses.regression import DistanceName, distance
from ..base import Follows, Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check, check_fit, middle


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 50               # grid of the teacher's solver; on a VP teacher it must divide 1000 (p: 50)
    skip: int = 1                 # nodes between t and s: 1 of 50 is 20 of 1000 times (p: 20)
    bridge: Literal["ddim", "data"] = "ddim"    # from x_t to x_s: the teacher's step, or the data's own path (a)
    loss: DistanceName = "huber"  # d, or "squared" (s: "huber" for the LoRA)
    huber_c: float = 0.001        # c of the pseudo-Huber loss (s)
    target_decay: float = 0.95    # of the target per update, where all weights are trained (p)
    shift: float = 1.0            # of the nodes of a flow towards noise; large pictures want more (Stable Diffusion 3:
                                  # 3)
    guidance_embedding: bool = False    # the student reads the guidance scale; else its weights hold the mean over the
                                        # range (p: true)

    def __post_init__(self) -> None:
        check(self)
        if self.bridge not in ("ddim", "data"):
            raise ValueError(f"bridge must be 'ddim' or 'data'; found {self.bridge!r}")


class LCM(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = roles["teacher"], roles["student"]
        self.target = roles.get("target", self.student)
        self.distance = distance(settings.loss, settings.huber_c)
        self.grid = grid(settings.nodes, settings.shift)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        needs: dict[str, Need] = {"teacher": Frozen(),
                                  "student": Trained("teacher", reads=("w",) * settings.guidance_embedding)}
        return needs | {"target": Follows("student", settings.target_decay)} if full else needs

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        check_fit("lcm", settings, steps, schedule)
        if settings.bridge == "data" and not settings.guidance_embedding and guidance != 1:
            raise ValueError("lcm with bridge: data asks no teacher that could be guided: let guidance be 1, or let a "
                             f"student that reads its scale go on reading it; found guidance {guidance}")
        scale = middle(guidance) if settings.guidance_embedding else None
        return Inference(steps, noise=1.0, nodes=settings.nodes, shift=settings.shift, guidance=scale)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t, s = self.times(step)
        w, noise = drawn(self.guidance, step), step.normal("noise", batch.shape)
        scale = torch.as_tensor(w, dtype=torch.float32).expand(len(batch))
        cond = batch.cond.replace(w=scale) if self.settings.guidance_embedding else batch.cond
        x_t = self.student.schedule.add_noise(batch.x0, noise, t)
        with torch.no_grad():
            x_s = (self.student.schedule.add_noise(batch.x0, noise, s) if self.settings.bridge == "data"
                   else bridge(ddim, guided(self.teacher, w), x_t, t, s, batch.cond))
            target = anchored(lambda x, u: consistency(self.target(x, u, cond)), x_s, s, t, s > 0)
        return {"consistency": self.distance(consistency(self.student(x_t, t, cond)), target).mean()}

    def times(self, step: Step) -> tuple[Tensor, Tensor]:
        """t uniform on the nodes above 0, and s `skip` nodes below or 0: (B,) float64."""
        t = discrete(self.grid[1:])(step.uniform("node"))
        return t, below(t, self.grid, self.settings.skip)
