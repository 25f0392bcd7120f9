"""SCott: Stochastic Consistency Distillation. Liu et al. 2024, arXiv:2403.01505.

    t              <- a node of the grid, s <- `skip` nodes nearer to the data
    x_t            <- noise the data to t
    x_s            <- `substeps` steps of the guided teacher's SDE from x_t to s  (a share eta of their noise is fresh)
    student        <- | f(x_t, t) - target(x_s, s) |^2, with target(x, 0) = x, and fool the heads on f(x_t, t)
    critic and its heads  <- a copy of the teacher, told t and the prompt, tells the data from f(x_t, t), at each of
                             the heads' positions
    target         <- running average of the student

Fresh noise corrects what the teacher got wrong before, and the student cannot follow it: it learns the mean of all
ends, which lies within the data. Of data of deviation C the mean of a step from t to r multiplies a deviation by
(alpha_r alpha_t C^2 + sqrt(sigma_r^2 - fresh^2) sigma_t) / (alpha_t^2 C^2 + sigma_t^2), where the ODE's has sigma_r for
the root. All in all the student's samples vary by 3 to 5 % less at eta = 0.1, by 20 to 40 % at 0.3, and hardly at all
at 1. So eta is small here, and the heads, and guidance, have to give back what it takes.

Source of the defaults: (a) accounts of the paper, whose training was not released. They differ on eta: from 0.1 to 0.3
of DDIM's, which stands here, or all the noise of the reverse SDE; and on d: squared, or Huber.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...diffusion.bridges import anchored, bridge
from ...diffusion.consistency import consistency
from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule
from ...diffusion.solvers import sde_ddim
from ...diffusion.times import discrete
from ...diffusion.triples import below, grid
from ...losses.adversarial import hinge_discriminator_loss, hinge_generator_loss, over_tokens
from ...losses.regression import DistanceName, distance
from ..base import (
    Follows,
    Frozen,
    Guidance,
    Heads,
    Inference,
    Losses,
    Method,
    Need,
    Trained,
    Update,
    check,
    check_fit,
    middle,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    nodes: int = 1000             # grid of the teacher's solver; on a VP teacher it must divide 1000 (a)
    skip: int = 24                # nodes between t and s (a)
    substeps: int = 3             # of the teacher from t to s (a)
    eta: float = 0.1              # share of fresh noise in each, from DDIM's 0 to DDPM's 1 (a: 0.1 to 0.3)
    loss: DistanceName = "squared"     # d, or "huber" (a)
    huber_c: float = 0.001        # c of the pseudo-Huber loss
    gan_weight: float = 0.4       # of fooling the heads; 0 leaves them out (a)
    target_decay: float = 0.95    # of the target per update (a)
    shift: float = 1.0            # of the nodes of a flow towards noise
    guidance_embedding: bool = False    # the student reads the guidance scale; else its weights hold the mean over the
                                        # range (a: true)

    def __post_init__(self) -> None:
        check(self)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be from 0, no fresh noise, to 1, all of it; found {self.eta}")


class SCott(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.target = (roles[name] for name in ("teacher", "student", "target"))
        self.discriminator, self.schedule = roles.get("discriminator"), self.student.schedule
        self.solver, self.grid = partial(sde_ddim, eta=settings.eta), grid(settings.nodes, settings.shift)
        self.distance = distance(settings.loss, settings.huber_c)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        student = Trained("teacher", reads=("w",) * settings.guidance_embedding)
        needs: dict[str, Need] = {"teacher": Frozen(), "student": student,
                                  "target": Follows("student", settings.target_decay)}
        game: dict[str, Need] = {"critic": Trained("teacher"), "discriminator": Heads("critic", kind="tokens")}
        return needs | (game if settings.gan_weight else {})

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        check_fit("scott", settings, steps, schedule)
        scale = middle(guidance) if settings.guidance_embedding else None
        return Inference(steps, noise=1.0, nodes=settings.nodes, shift=settings.shift, guidance=scale)

    def updates(self) -> list[Update]:
        game = [Update(("critic", "discriminator"), self.critic_loss, shares=1)] if self.discriminator else []
        return [Update(("student",), self.student_loss), *game]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        (t, s), w = self.times(step), drawn(self.guidance, step)
        scale = torch.as_tensor(w, dtype=torch.float32).expand(len(batch))
        cond = batch.cond.replace(w=scale) if self.settings.guidance_embedding else batch.cond
        x_t = self.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            x_s = bridge(self.solver, guided(self.teacher, w), x_t, t, s, batch.cond, self.settings.substeps,
                         lambda i, shape: step.normal(f"fresh {i}", shape[1:]))
            target = anchored(lambda x, u: consistency(self.target(x, u, cond)), x_s, s, t, s > 0)
        x = consistency(self.student(x_t, t, cond))
        losses = {"consistency": self.distance(x, target).mean()}
        if self.discriminator is None:
            return losses
        step.kept.update(fake=x.detach(), t=t)
        fooled = over_tokens([hinge_generator_loss(each) for each in self.discriminator(x, t, batch.cond)])
        return losses | {"gan": self.settings.gan_weight * fooled.mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        real, fake = (self.discriminator(x, step.kept["t"], batch.cond) for x in (batch.x0, step.kept["fake"]))
        losses = [hinge_discriminator_loss(*pair) for pair in zip(real, fake, strict=True)]
        return {"discriminator": over_tokens(losses).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor]:
        """t uniform on the nodes above 0, and s `skip` nodes below or 0: (B,) float64."""
        t = discrete(self.grid[1:])(step.uniform("node"))
        return t, below(t, self.grid, self.settings.skip)
