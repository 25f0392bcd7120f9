"""BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping. Gu et al. 2023, arXiv:2306.05544.

    e       <- noise; the teacher's way from it is x_t = alpha_t y_t + sigma_t e, and y_t its signal
    t, s    <- a node, and the one below it
    y_t     <- the student's signal y(e, t)
    x_t     <- alpha_t y_t + sigma_t e
    x_s     <- one DDIM step of the guided teacher from x_t
    loss    =  | y(e, s) - the signal of x_s |^2

No data are seen, and no state but those that the student itself makes of noise. The network's input is always e, at t =
1; the node that is asked for is told beside it, as a flow map is told where to land, so that no noise level is said
that is not there, and y(e, 0) is one step's sample. The signal is the one x_0 whose DDIM step from e at t = 1 lands on
the way: where the schedule's alpha_1 is 0, y_t as above. The paper's first order step of its signal-ODE, d y / d t =
-lambda'_t (x_0 - y_t), lambda = log(sigma / alpha), is the DDIM step at small s - t, and grows without bound towards t
= 1. Its boundary loss, y(e, 1) = the teacher's x_0 of e, holds at the first node below by construction here: from t =
1 the way begins at e, whatever y says. Left out is its weight of 1 / (t - s)^2, one number at even nodes.

Errors are handed down from node to node, so that the teacher's steps should be few as well as fine.

Sources: the signal-ODE and the loss as told by others, (o) ours; the authors' code was not found.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.bridges import bridge
from ...diffusion.contracts import Batch, Condition
from ...diffusion.draws import Step
from ...diffusion.flow_map import secant_target, toward
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule
from ...diffusion.solvers import ddim
from ...diffusion.times import discrete
from ...diffusion.triples import below, grid
from ...losses.regression import squared
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check, check_told


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 40                # the teacher's DDIM steps from noise to data (o)
    solver_steps: int = 1          # of the teacher's DDIM between two nodes (o)

    def __post_init__(self) -> None:
        check(self)


class BOOT(Method):
    Settings = Settings
    data = ("prompts",)

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = roles["teacher"], roles["student"]
        self.schedule, self.grid = self.student.schedule, grid(settings.nodes)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher", reads=("r",))}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps != 1:
            raise ValueError(f"boot makes students of 1 step, from noise to the data's signal; found {steps}")
        check_told("boot", settings.nodes * settings.solver_steps, schedule)
        return Inference(1)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t = discrete(self.grid[1:])(step.uniform("node"))
        s, one, e = below(t, self.grid), torch.ones_like(t), step.normal("start", batch.shape)
        with torch.no_grad():
            x_t = toward(self.signal(e, t, batch.cond), e, one, t, self.schedule)
            x_s = bridge(ddim, guided(self.teacher, drawn(self.guidance, step)), x_t, t, s, batch.cond,
                         self.settings.solver_steps)
            aim = secant_target(e, x_s, one, s, self.schedule)
        return {"bootstrap": squared(self.signal(e, s, batch.cond), aim).mean()}

    def signal(self, e: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """y(e, t)."""
        return self.student(e, torch.ones_like(t), cond.replace(r=t)).x0
