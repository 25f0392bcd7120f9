"""iCT: Improved Techniques for Training Consistency Models. Song & Dhariwal 2023, arXiv:2310.14189.

    [data, noise] is cut at the levels of Karras et al., twice as many each time
    t > s  <- neighbours, drawn as ln t ~ N(-1.1, 2^2) falls between them           (t, s: sigma / alpha)
    x_t, x_s  <- the data under one noise at t and at s
    loss   =  d( f(x_t, t), f(x_s, s) ) / (t - s)         the second with its gradient stopped, under the same dropout
    d      =  the pseudo-Huber distance of whole samples

No teacher is asked, no target averaged, nothing guided: what is learned is the law of the data under its prompts. The
paper begins with random weights and EDM's parameterisation; here a student begins with the pipeline's weights, as ECT
(arXiv:2406.14548) does, and f is what LCMScheduler and FlowMatchLCMScheduler sample, with their own boundary. Their
first time stands for the paper's least level, pure noise for its largest, and the times at which they ask the student
are nodes too. A discrete schedule has no more nodes than times.

d is a distance to a mean only where its c is above what it measures: with the paper's c, errors of noisy targets in few
dimensions are weighed as their median would be.

Source of the defaults: (p) the paper; as numbers they were read in diffusers' script of consistency training, whose d
is of single elements.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.consistency import consistency, origin
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.schedule import Schedule, VariancePreserving, like
from ...diffusion.times import LEVELS, karras, weighted
from ...diffusion.triples import below, doubling
from ...losses.regression import whole_huber
from ..base import Guidance, Inference, Losses, Method, Need, Trained, Update, check

SIGMAS = (0.002, 80.0)            # sigma / alpha that counts as the data's, and as pure noise's (p)


@dataclass(frozen=True, kw_only=True)
class Settings:
    first_nodes: int = 10         # steps of the grid when training begins (p)
    last_nodes: int = 1280        # the same at its end; between them they double at equal times (p)
    mean: float = -1.1            # of ln(sigma / alpha), by which pairs are drawn (p)
    std: float = 2.0              # of the same (p)
    huber_c: float = 0.00054      # c of the pseudo-Huber distance, times the root of a sample's size (p)

    def __post_init__(self) -> None:
        check(self)
        if not 2 <= self.first_nodes <= self.last_nodes:
            raise ValueError("first_nodes must be at least 2 and at most last_nodes; found "
                             f"{self.first_nodes} and {self.last_nodes}")
        if self.std <= 0:
            raise ValueError(f"std must be above 0; found {self.std}")


class ICT(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.student, self.schedule = roles["student"], roles["student"].schedule
        self.nodes = doubling(settings.first_nodes, settings.last_nodes)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"student": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if not 1 <= steps <= settings.first_nodes:
            raise ValueError(f"ict wants at least one node a step: with first_nodes = {settings.first_nodes} 1 to "
                             f"{settings.first_nodes} steps; found {steps}")
        return Inference(steps, noise=1.0)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        (t, s), noise = self.times(step), step.normal("noise", batch.shape)
        x_t, x_s = (self.schedule.add_noise(batch.x0, noise, u) for u in (t, s))
        with torch.no_grad(), step.same_dropout("pair"):
            target = consistency(self.student(x_s, s, batch.cond))
        with step.same_dropout("pair"):
            apart = whole_huber(consistency(self.student(x_t, t, batch.cond)), target, self.settings.huber_c)
        return {"consistency": (like(1 / (self.level(t) - self.level(s)), apart) * apart).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor]:
        """t with the probability that the log-normal law gives to what lies between it and the node below, s: (B,)
        float64."""
        nodes = grid(self.schedule, self.nodes(step.progress), self.sampler.times)
        place = (self.schedule.angle(nodes).tan().log() - self.settings.mean) / self.settings.std
        t = weighted(nodes[1:], torch.special.ndtr(place).diff().tolist())(step.uniform("node"))
        return t, below(t, nodes)

    def level(self, t: Tensor) -> Tensor:
        """sigma / alpha of the data and of pure noise as SIGMAS has them."""
        return self.schedule.angle(t).tan().clamp(*SIGMAS)


def grid(schedule: Schedule, steps: int, sampled: Tensor) -> Tensor:
    """Times, ascending from `origin` to 1: those of Karras et al. 2022, eq. 5, where a network knows them, and those at
    which the student is asked."""
    low, high = schedule.angle(torch.tensor([1 / LEVELS, 1.0], dtype=torch.float64)).tan().tolist()
    times = karras(schedule, steps + 1, max(SIGMAS[0], low), min(SIGMAS[1], high))
    times[0], times[-1] = 1.0, origin(schedule)
    known = (LEVELS * times).round() / LEVELS if isinstance(schedule, VariancePreserving) else times
    return torch.cat([known, sampled]).unique()
