"""SDXL-Lightning: Progressive Adversarial Diffusion Distillation. Lin et al. 2024, arXiv:2402.13929. One stage, nodes
-> steps.

    x_t            <- data noised to a node t of the student's grid, and pure noise at t = 1       (section 3.5)
    student        <- its one step from x_t to r fools the discriminator
    critic and its heads  <- tell the teacher's nodes / steps small steps from x_t to r from the student's one  (eq. 20)

The critic is a copy of the teacher, trained with the heads on its middle. Told x_t beside the landing ("pair", eq. 22)
it rejects whatever leaves the teacher's trajectory; shown the landing alone ("single", eq. 23) only what is no likely
x_r. The paper goes 128 -> 32 by "mse" and with guidance; then 32 -> 8 -> 4 -> 2 -> 1 without, by "pair" and then
"single", each stage with the student before as its teacher and a new discriminator.

Source of the defaults: (p) the paper. Its last stage also turns the one-step student into one that predicts x_0, which
views do here; its EulerDiscreteScheduler starts from 0.998 times the noise that training starts from, DDIMScheduler
from all of it.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import ddim_step, flow_map
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, where
from ...diffusion.times import LEVELS, discrete
from ...losses.adversarial import discriminator_loss, generator_loss
from ...losses.regression import squared
from ..base import Frozen, Guidance, Heads, Inference, Losses, Method, Need, Trained, Update, check_counts


@dataclass(frozen=True, kw_only=True)
class Settings:
    objective: Literal["pair", "single", "mse"] = "pair"
    nodes: int = 32                    # steps of the teacher from noise to data, a multiple of the student's (p: 128,
                                       # 32, 8, 4, 2)
    starts: int | None = None          # times that the student is trained at; None: its own steps (p: 4 for 1
                                       # and 2 steps)
    discriminator_times: tuple[float, ...] = ()    # noise levels at which the discriminator sees landings on the data,
    # one of them drawn; none: no noise (p: 0.01, 0.25, 0.5, 0.75 for 1 and 2 steps, the first five times over)

    def __post_init__(self) -> None:
        if self.objective not in ("pair", "single", "mse"):
            raise ValueError(f"objective must be 'pair', 'single' or 'mse'; found {self.objective!r}")
        check_counts(self)
        if self.starts is not None and (self.starts < 1 or self.nodes % self.starts):
            raise ValueError(f"starts must divide nodes; found {self.starts} and {self.nodes}")
        if any(not 0 < s <= 1 for s in self.discriminator_times):
            raise ValueError(f"discriminator_times are times above 0 and up to 1; found {self.discriminator_times}")


class Lightning(Method):
    Settings = Settings
    data = ("images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.discriminator = roles["teacher"], roles["student"], roles.get("discriminator")
        self.schedule, self.small = self.teacher.schedule, settings.nodes // sampler.nfe
        self.starts = settings.starts or sampler.nfe
        self.logits = {"pair": self.pair_logits, "single": self.single_logits, "mse": None}[settings.objective]

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        needs: dict[str, Need] = {"teacher": Frozen(), "student": Trained("teacher")}
        if settings.objective == "mse":
            return needs
        return needs | {"critic": Trained("teacher"),
                        "discriminator": Heads("critic", pair=settings.objective == "pair")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps < 1 or settings.nodes % steps or (settings.starts or steps) % steps:
            raise ValueError(f"a stage of lightning joins a whole number of its teacher's {settings.nodes} steps into "
                             "one, and begins at "
                             f"all of the student's times; found {steps} steps and starts = {settings.starts}")
        return Inference(steps)

    @property
    def denoiser(self) -> None:
        """The critic only carries heads."""

    def updates(self) -> list[Update]:
        if self.logits is None:
            return [Update(("student",), self.regression)]
        return [Update(("student",), self.student_loss),
                Update(("critic", "discriminator"), self.critic_loss, shares=1)]

    # -- losses ------------------------------------------------------------------------------------------------------

    def regression(self, batch: Batch, step: Step) -> Losses:
        x_t, times = self.started(batch, step)
        return {"mse": squared(self.landing(x_t, times, batch), self.teacher_landing(x_t, times, batch, step)).mean()}

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x_t, times = self.started(batch, step)
        x_r = self.landing(x_t, times, batch)
        step.kept.update(x_t=x_t, times=times, x_r=x_r.detach())
        return {"gan": generator_loss(self.logits(x_r, x_t, times, batch, step)).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        x_t, times, fake = (step.kept[name] for name in ("x_t", "times", "x_r"))
        real = self.teacher_landing(x_t, times, batch, step)
        logits = (self.logits(x_r, x_t, times, batch, step) for x_r in (real, fake))
        return {"discriminator": discriminator_loss(*logits).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def started(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """x_t, and the teacher's times from there to where the student's step lands, (small + 1, B) float64."""
        start = (step.integers("start", self.starts) + 1) * (self.settings.nodes // self.starts)
        node = (start - torch.arange(self.small + 1)[:, None]).clamp_min(0)
        times = node.double() / self.settings.nodes
        return self.schedule.start(batch.x0, step.normal("noise", batch.shape), times[0]), times

    def landing(self, x_t: Tensor, times: Tensor, batch: Batch) -> Tensor:
        return flow_map(self.student, x_t, times[0], times[-1], batch.cond)

    @torch.no_grad()
    def teacher_landing(self, x_t: Tensor, times: Tensor, batch: Batch, step: Step) -> Tensor:
        """Where the teacher's small steps land. What has reached the data stays there; the network reads the time of
        its start."""
        teacher = guided(self.teacher, drawn(self.guidance, step))
        for t, r in pairwise(times):
            on = t > 0
            x_t = where(on, ddim_step(teacher(x_t, torch.where(on, t, times[0]), batch.cond), r), x_t)
        return x_t

    def pair_logits(self, x_r: Tensor, x_t: Tensor, times: Tensor, batch: Batch, step: Step) -> Tensor:
        """Logits (B, K) of the landing, given where it came from."""
        return self.discriminator.pair(*self.discriminator_input(x_r, times[-1], step), x_t, times[0], batch.cond)

    def single_logits(self, x_r: Tensor, x_t: Tensor, times: Tensor, batch: Batch, step: Step) -> Tensor:
        """Logits (B, K) of the landing alone."""
        return self.discriminator(*self.discriminator_input(x_r, times[-1], step), batch.cond)

    def discriminator_input(self, x_r: Tensor, r: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The landing as the critic sees it, and the time that it reads: what lies on the data is noised to one of
        `discriminator_times` (eq. 25), the teacher's and the student's alike, or, without any, keeps its noise and
        reads the least time that a network knows."""
        if not self.settings.discriminator_times:
            return x_r, r.clamp_min(1 / LEVELS)
        s = discrete(torch.tensor(self.settings.discriminator_times, dtype=torch.float64))(step.uniform("judged s"))
        noised = self.schedule.add_noise(x_r, step.normal("judged noise", x_r.shape[1:]), s)
        return where(r > 0, x_r, noised), torch.where(r > 0, r, s)
