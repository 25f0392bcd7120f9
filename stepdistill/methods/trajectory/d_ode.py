"""D-ODE: Distilling ODE Solvers of Diffusion Models into Smaller Steps. Kim, Tang & Yu, CVPR 2024, arXiv:2309.16421.

    x       <- noise
    y_1 ..  <- the guided teacher's states from there, by `substeps` steps of DDIM for each of the student's
    for each step i of the student's sampler, from t to r:
        o_i     <- the output, eps or x_0, of the same guided teacher at x
        x       <- where DDIM's step lands, + share_i (o_i - o_(i-1)) in each step but the first
        loss    +=  | x - y_i |^2, whose slope is that of share_i alone

The network is the teacher's, and stays so: trained are k - 1 numbers, which are the solver's, and hold for one
guidance scale, one k and one teacher. No data are seen, nothing is back-propagated through a network. At the least
loss share_i = <o_i - o_(i-1), y_i - ddim_i> / |o_i - o_(i-1)|^2, the means over noises and prompts; the released code
solves that on one batch, step after step. Here batches are fresh, and the trainer's optimizer comes to the same
numbers, so that a run is resumed, cut into micro-batches and spread over ranks like any other. Let train.weight_decay
be 0, which would draw them to DDIM's.

On a Gaussian of one variance all that a step can miss is a multiple of o_i - o_(i-1): the shares are exact from the
second step on. On others they are a compromise, and two or three steps from noise to data have little to look back at.

The paper's o_i + lambda_i (o_i - o_(i-1)) in the place of o_i is the same: a share is lambda_i times the factor with
which a step takes o_i, as in the released code. Left out is that code's share of the first step of noise predictors,
where the noise itself stands for the output before: on a flow the two are equal, and on Toy it changes next to nothing.
No config of a stock scheduler holds such numbers (DPM-Solver++'s second order is the shares that its times give): a
solver is drawn with from its run, and is not exported.

Sources of the defaults: (c) the released code, of both kinds of networks; kim-sanghwan/D-ODE-Solvers.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import guided
from ...diffusion.mixing import mixed_step
from ...diffusion.schedule import Schedule
from ...diffusion.solvers import ddim
from ...losses.regression import squared
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check_counts, middle


@dataclass(frozen=True, kw_only=True)
class Settings:
    substeps: int = 10                         # of the teacher's DDIM for each step of the student's (c)
    output: Literal["eps", "x0"] = "eps"       # what is looked back at (c: eps where networks predict noise, x0 where
                                               # data)

    def __post_init__(self) -> None:
        check_counts(self)
        if self.substeps < 2:
            raise ValueError(f"substeps must be at least 2, finer than the student's own; found {self.substeps}")
        if self.output not in ("eps", "x0"):
            raise ValueError(f"output must be 'eps' or 'x0'; found {self.output!r}")


class DODE(Method):
    Settings = Settings
    data = ("prompts",)

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.student, self.teacher = roles["student"], guided(roles["teacher"], middle(guidance))
        ends = torch.cat([sampler.times, sampler.landings[-1:]])
        within = torch.arange(settings.substeps, dtype=torch.float64) / settings.substeps
        self.fine = torch.cat([torch.lerp(ends[:-1, None], ends[1:, None], within).flatten(), ends[-1:]])

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher", solver=settings.output)}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps < 2:
            raise ValueError(f"d_ode makes solvers of at least 2 steps, of which the second looks back; found {steps}")
        return Inference(steps, cfg=middle(guidance))

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        x = self.sampler.start * step.normal("start", batch.shape)
        aims, before, errors = self.states(x, batch), None, []
        for i, r in enumerate(self.sampler.landings):
            at, r = torch.full((len(x),), i), r.expand(len(x))
            with torch.no_grad():
                here = self.sampler.predict(self.teacher, x, at, batch.cond)
            share = self.student.shares[i - 1] if i else 0.0
            x = mixed_step(before or here, here, r, share, self.student.output)
            if i:
                errors.append(squared(x, aims[i]).mean())
            before, x = here, x.detach()
        return {"solver": torch.stack(errors).sum()}

    @torch.no_grad()
    def states(self, x: Tensor, batch: Batch) -> list[Tensor]:
        """Where the teacher's finer solve from x is when each step of the student's lands."""
        found: list[Tensor] = []
        ddim(self.teacher, x, self.fine, batch.cond, seen=lambda i, state: found.append(state))
        return found[self.settings.substeps - 1::self.settings.substeps]
