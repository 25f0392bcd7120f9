"""AccVideo: Accelerating Video Diffusion Model with Synthetic Dataset. Zhang et al. 2025, arXiv:2503.19462.

    once           noise -> states of the teacher's way at the ends of even steps, and kept         (data.pairs)
    j              <- one of the student's k steps, from node j, x_t at t, to node j + 1, x_r at r
    x              <- the student's DDIM step from x_t to r
    student        <- k^2 | x - x_r |^2, fool the heads of node j + 1 on x
    discriminator  <- on the frozen teacher's features at r tell x_r from x, at each position: each node has heads of
                      its own

On a flow the first term is that of the velocity, (x_t - x_r) / (t - r). The stored states are real where they lie: no
noise is added to what is judged, and no state is asked that the teacher does not visit. They may be of pictures as of
videos. Guidance is the pairs' own. The last node is the data, of which the teacher is told its least noise.

Sources: the paper's abstract and (c) the authors' code, which is of inference alone: what it says of the training are
the nodes. The terms are as they are told elsewhere; weights and hinge are (o) ours.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.flow_map import flow_map
from ...diffusion.schedule import Schedule
from ...diffusion.times import LEVELS
from ...losses.adversarial import hinge_discriminator_loss, hinge_generator_loss, over_tokens
from ...losses.regression import squared
from ..base import Frozen, Guidance, Heads, Inference, Losses, Method, Need, Trained, Update, check


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 5                 # of the teacher's way, each with heads; the student's steps are as many (c: every
                                   # tenth of 50 steps), or divide them
    gan_weight: float = 0.1        # of fooling the heads; 0 leaves them out (o)
    critic_steps: int = 1          # updates of the heads a step, all on the student's own step (o)

    def __post_init__(self) -> None:
        check(self)


class AccVideo(Method):
    Settings = Settings
    data = ("pairs",)

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.student, self.discriminator, self.steps = roles["student"], roles.get("discriminator"), sampler.nfe

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        needs: dict[str, Need] = {"teacher": Frozen(), "student": Trained("teacher")}
        heads = {"discriminator": Heads("teacher", kind="tokens", nodes=settings.nodes)}
        return needs | (heads if settings.gan_weight else {})

    @classmethod
    def waypoints(cls, settings: Settings, steps: int) -> int:
        return steps

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps < 1 or settings.nodes % steps:
            raise ValueError(f"accvideo has heads for each of its nodes, {settings.nodes}, on which a student lands "
                             f"whose steps divide them; found {steps} steps")
        return Inference(steps)

    def updates(self) -> list[Update]:
        count = self.settings.critic_steps
        heads = [Update(("discriminator",), self.critic_loss, repeat=count, shares=count)] if self.discriminator else []
        return [Update(("student",), self.student_loss), *heads]

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        x_t, x_r, t, r = batch.pairs.leg(step.integers("leg", self.steps), self.steps)
        x = flow_map(self.student, x_t, t, r, batch.cond)
        losses = {"regression": self.steps**2 * squared(x, x_r).mean()}
        if self.discriminator is not None:
            step.kept.update(real=x_r, fake=x.detach(), r=r)
            fooled = over_tokens([hinge_generator_loss(each) for each in self.logits(x, r, batch)])
            losses["gan"] = self.settings.gan_weight * fooled.mean()
        return losses

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        real, fake = (self.logits(step.kept[name], step.kept["r"], batch) for name in ("real", "fake"))
        losses = [hinge_discriminator_loss(*pair) for pair in zip(real, fake, strict=True)]
        return {"discriminator": over_tokens(losses).mean()}

    def logits(self, x: Tensor, r: Tensor, batch: Batch) -> list[Tensor]:
        """K maps of logits, (B, N) each, of states at r."""
        return self.discriminator(x, r.clamp(min=1 / LEVELS), batch.cond)
