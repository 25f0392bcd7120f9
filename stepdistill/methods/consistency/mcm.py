"""Multistep Consistency Models. Heek, Hoogeboom & Salimans 2024, arXiv:2403.06807, algorithms 1 and 2.

    [0, 1] is cut into as many segments as the student has steps, and each into nodes, more and more of them
    t        <- a node, s <- the node below it, r <- the start of its segment
    x_t      <- noise the data to t
    x_s      <- one aDDIM step of the guided teacher from x_t to s
    x_r      <- one DDIM step of the student from x_s to r, gradient stopped; x_s itself where s is r
    loss     =  (SNR + 1) | x_0 of the student - the x_0 whose step from x_t lands on x_r |

With one segment it is a consistency model, with as many as nodes a diffusion model. aDDIM is DDIM that gives back the
variance which the mean of x_0 lacks; what is lacking is read off the data: eta |x_0 of the teacher - x_0|^2. The
student is sampled by DDIM, and only with as many steps as it has segments.

`bridge: data` is the paper's training without a teacher: x_s is made of the x_0 and the noise that made x_t. Nothing is
guided then.

Source of the defaults: (p) the paper. Its sampler has eta, its training box leaves it out, as if it were 1.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.bridges import anchored
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import flow_map, secant_target
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, like
from ...diffusion.solvers import addim_step
from ...diffusion.times import discrete
from ...diffusion.triples import below, exponential, grid
from ...diffusion.weighting import snr_plus_one, truncated_snr
from ...losses.regression import norm, squared
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check_counts


@dataclass(frozen=True, kw_only=True)
class Settings:
    first_nodes: int = 64          # of the teacher's grid when training begins, all segments together (p)
    last_nodes: int = 1280         # of the same later; between them they grow by equal factors (p)
    grown: float = 0.5             # share of the training at which the last count is reached (p: 100,000 of 200,000)
    bridge: Literal["addim", "data"] = "addim"      # from x_t to x_s: the teacher's step, or the data's own path (p)
    eta: float = 0.75              # of the variance that aDDIM gives back; 0 is DDIM (p)
    loss: Literal["norm", "squared"] = "norm"       # of the error in x_0 (p)
    weight: Literal["v", "truncated"] = "v"         # of the loss: SNR + 1, or max(SNR, 1) (p)

    def __post_init__(self) -> None:
        check_counts(self)
        if self.first_nodes > self.last_nodes:
            raise ValueError("first_nodes must be at most last_nodes; found "
                             f"{self.first_nodes} and {self.last_nodes}")
        if not 0 < self.grown <= 1 or self.eta < 0:
            raise ValueError(f"grown must be in (0, 1] and eta not negative; found {self.grown}, {self.eta}")
        if self.bridge not in ("addim", "data"):
            raise ValueError(f"bridge must be 'addim' or 'data'; found {self.bridge!r}")
        if self.loss not in ("norm", "squared") or self.weight not in ("v", "truncated"):
            raise ValueError("loss must be 'norm' or 'squared' and weight 'v' or 'truncated'; found "
                             f"{self.loss!r}, {self.weight!r}")


class MCM(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = roles["teacher"], roles["student"]
        self.schedule, self.edges = self.student.schedule, grid(sampler.nfe)
        self.nodes = exponential(settings.first_nodes, settings.last_nodes, settings.grown)
        self.distance = {"norm": norm, "squared": squared}[settings.loss]
        self.weight = {"v": snr_plus_one, "truncated": truncated_snr}[settings.weight]

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if not 1 <= steps <= settings.first_nodes:
            raise ValueError(f"mcm wants at least one node a step: with first_nodes = {settings.first_nodes} 1 to "
                             f"{settings.first_nodes} steps; found {steps}")
        if settings.bridge == "data" and guidance != 1:
            raise ValueError("mcm with bridge: data asks no teacher that could be guided: let guidance be 1; found "
                             f"{guidance}")
        return Inference(steps)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.student_loss)]

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        t, s, r = self.times(step)
        noise = step.normal("noise", batch.shape)
        x_t = self.schedule.add_noise(batch.x0, noise, t)
        with torch.no_grad():
            x_s = (self.schedule.add_noise(batch.x0, noise, s) if self.settings.bridge == "data"
                   else self.teacher_step(x_t, t, s, batch, step))
            x_r = anchored(lambda x, u: flow_map(self.student, x, u, r, batch.cond), x_s, s, t, s > r)
            aim = secant_target(x_t, x_r, t, r, self.schedule)
        apart = self.distance(self.student(x_t, t, batch.cond).x0, aim)
        return {"consistency": (like(self.weight(self.schedule, t), apart) * apart).mean()}

    # -- terms -----------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """t uniform on the nodes above 0, as many in each segment, s the node below, r the start of the segment: (B,)
        float64."""
        steps = self.sampler.nfe
        nodes = grid(steps * round(self.nodes(step.progress) / steps))
        t = discrete(nodes[1:])(step.uniform("node"))
        return t, below(t, nodes), below(t, self.edges)

    def teacher_step(self, x_t: Tensor, t: Tensor, s: Tensor, batch: Batch, step: Step) -> Tensor:
        p = guided(self.teacher, drawn(self.guidance, step))(x_t, t, batch.cond)
        return addim_step(p, s, self.settings.eta * squared(p.x0, batch.x0))
