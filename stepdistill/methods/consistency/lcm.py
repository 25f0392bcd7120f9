"""Latent Consistency Models. Luo et al. 2023, arXiv:2310.04378, algorithm 1; as a LoRA: arXiv:2311.05556.

    t      <- a node of the grid, s <- `skip` nodes nearer to the data
    x_t    <- noise the data to t
    x_s    <- one DDIM step of the guided teacher from x_t to s
    loss   =  d( f(x_t, t), target(x_s, s) )        with target(x, 0) = x
    target <- running average of the student        (an adapter: the student itself, gradient stopped)

On a rectified flow, which the paper does not treat, the nodes are uniform in t, or shifted, and f is x_0.

Sources of the defaults: (p) the paper, (s) diffusers' scripts train_lcm_distill_*, whose figures differ.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.consistency import consistency
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import ddim_step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, VariancePreserving, like
from ...diffusion.times import LEVELS, shifted, uniform
from ...losses.regression import pseudo_huber, squared
from ..base import Follows, Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, middle


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 50               # grid of the teacher's solver; on a VP teacher it must divide 1000 (p: 50)
    skip: int = 1                 # nodes between t and s: 1 of 50 is 20 of 1000 times (p: 20)
    loss: Literal["huber", "squared"] = "huber"   # d, or "squared" (s: "huber" for the LoRA)
    huber_c: float = 0.001        # c of the pseudo-Huber loss (s)
    target_decay: float = 0.95    # of the target per update, where all weights are trained (p)
    shift: float = 1.0            # of the nodes of a flow towards noise; large pictures want more (Stable Diffusion 3:
                                  # 3)
    guidance_embedding: bool = False    # the student reads the guidance scale; else its weights hold the mean over the
                                        # range (p: true)

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes must be at least 1; found {self.nodes}")
        if not 1 <= self.skip <= self.nodes:
            raise ValueError(f"skip must be from 1 to nodes = {self.nodes}; found {self.skip}")
        if self.loss not in ("huber", "squared"):
            raise ValueError(f"loss must be 'huber' or 'squared'; found {self.loss!r}")
        if self.huber_c <= 0 or not 0 <= self.target_decay < 1:
            raise ValueError(f"huber_c must be above 0 and target_decay in [0, 1); found {self.huber_c}, "
                             f"{self.target_decay}")
        if self.shift <= 0:
            raise ValueError(f"shift must be above 0, where 1 leaves the nodes uniform; found {self.shift}")


class LCM(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = roles["teacher"], roles["student"]
        self.target = roles.get("target", self.student)
        self.distance = {"huber": partial(pseudo_huber, c=settings.huber_c), "squared": squared}[settings.loss]

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        needs: dict[str, Need] = {"teacher": Frozen(),
                                  "student": Trained("teacher", reads=("w",) * settings.guidance_embedding)}
        return needs | {"target": Follows("student", settings.target_decay)} if full else needs

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if not 1 <= steps <= settings.nodes:
            raise ValueError(f"lcm with nodes = {settings.nodes} serves 1 to {settings.nodes} steps; found {steps}")
        scale = middle(guidance) if settings.guidance_embedding else None
        if isinstance(schedule, VariancePreserving) and (LEVELS % settings.nodes or settings.shift != 1):
            raise ValueError(f"lcm on a variance-preserving teacher wants nodes that divide {LEVELS}, its times, and "
                             "no shift; found "
                             f"nodes = {settings.nodes}, shift = {settings.shift}")
        return Inference(steps, noise=1.0, nodes=settings.nodes, shift=settings.shift, guidance=scale)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t, s = self.times(step)
        w = drawn(self.guidance, step)
        scale = torch.as_tensor(w, dtype=torch.float32).expand(len(batch))
        cond = batch.cond.replace(w=scale) if self.settings.guidance_embedding else batch.cond
        x_t = self.student.schedule.add_noise(batch.x0, step.normal("noise", batch.x0.shape[1:]), t)
        with torch.no_grad():
            x_s = ddim_step(guided(self.teacher, w)(x_t, t, batch.cond), s)
            inner = consistency(self.target(x_s, torch.where(s > 0, s, t), cond))
            target = torch.where(like(s, x_s) > 0, inner, x_s)
        return {"consistency": self.distance(consistency(self.student(x_t, t, cond)), target).mean()}

    # -- terms -----------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor]:
        """t uniform on the nodes i / N, i = 1 .. N, and s `skip` nodes below or 0, both shifted. (B,) float64."""
        i, node = step.integers("node", self.settings.nodes) + 1, shifted(uniform(), self.settings.shift)
        t, s = (node(n.double() / self.settings.nodes) for n in (i, (i - self.settings.skip).clamp_min(0)))
        return t, s
