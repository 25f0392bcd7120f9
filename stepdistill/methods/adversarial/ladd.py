"""LADD: Latent Adversarial Diffusion Distillation. Sauer et al. 2024, arXiv:2403.12015.

    t              <- a node of the student's grid, by a law that begins with the easy ones
    x              <- the student's x_0 from data noised to t                 (the data: what the teacher drew, section
    3)
    student        <- fool the heads on x, noised again to s
    discriminator  <- heads on the frozen teacher's features tell noised data from noised x, each at its own s ~
                      logit-normal

No other loss: the teacher's own pictures carry its guidance. The heads give a logit at every position, each with a
margin of its own, and are told s and the prompt. On other noises than a flow's, s is the time of the same
signal-to-noise ratio.

Sources of the defaults: (p) the paper. It says nothing of how often either side is updated; its shares are those of
long runs, and a run of a thousand updates wants even ones.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...diffusion.contracts import Batch
from ...diffusion.draws import Step
from ...diffusion.schedule import RectifiedFlow, Schedule, VariancePreserving
from ...diffusion.times import LEVELS, logit_normal, nodes, weighted
from ...losses.adversarial import hinge_discriminator_loss, hinge_generator_loss, over_tokens
from ..base import Frozen, Guidance, Heads, Inference, Losses, Method, Need, Trained, Update, check_counts


@dataclass(frozen=True, kw_only=True)
class Settings:
    shares: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)     # of the student's nodes, noise first: t = 1, 0.75, 0.5, 0.25
                                                         # (p)
    warmup_shares: tuple[float, ...] = (0.0, 0.0, 0.5, 0.5)    # the same, in the warm-up (p)
    warmup_updates: int = 500          # length of the warm-up (p); 0 leaves it out
    mean: float = 1.0                  # of logit s: higher judges structure, lower texture (p)
    std: float = 1.0                   # of logit s (p)
    critic_steps: int = 1              # updates of the heads a step, all on the student's own sample

    def __post_init__(self) -> None:
        for shares in (self.shares, self.warmup_shares):
            if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
                raise ValueError("shares and warmup_shares are probabilities, none negative, that sum to 1; found "
                                 f"{shares}")
        if len(self.shares) != len(self.warmup_shares):
            raise ValueError("shares and warmup_shares are of the same nodes, so of one length; found "
                             f"{len(self.shares)} and {len(self.warmup_shares)}")
        check_counts(self)
        if self.warmup_updates < 0 or self.std <= 0:
            raise ValueError("warmup_updates must not be negative, and std be above 0; found "
                             f"{self.warmup_updates}, {self.std}")


class LADD(Method):
    Settings = Settings
    data = ("samples", "images")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.student, self.discriminator = roles["student"], roles["discriminator"]
        self.schedule = roles["teacher"].schedule
        grid = nodes(len(settings.shares)).flip(0)
        self.warmup_law, self.law = weighted(grid, settings.warmup_shares), weighted(grid, settings.shares)
        self.logit_normal = logit_normal(settings.mean, settings.std)

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"),
                "discriminator": Heads("teacher", kind="tokens")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        count = len(settings.shares)
        if steps < 1 or count % steps:
            raise ValueError(f"ladd trains its student at {count} times, those of a sampler whose steps divide "
                             f"{count}; found {steps} steps")
        if isinstance(schedule, VariancePreserving) and LEVELS % count:
            raise ValueError("a discrete schedule has evenly spaced times only where their number divides its "
                             f"{LEVELS}; "
                             f"ladd is set to {count}")
        return Inference(steps, noise=1.0)

    def updates(self) -> list[Update]:
        count = self.settings.critic_steps
        return [Update(("student",), self.student_loss),
                Update(("discriminator",), self.critic_loss, repeat=count, shares=count)]

    # -- losses, in the order of the algorithm -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        law = self.warmup_law if step.index < self.settings.warmup_updates else self.law
        t = law(step.uniform("t"))
        x = self.student(self.schedule.start(batch.x0, step.normal("start", batch.shape), t), t, batch.cond).x0
        step.kept["sample"] = x.detach()
        logits = self.logits(x, batch, step, "fake")
        return {"gan": over_tokens([hinge_generator_loss(each) for each in logits]).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        real, fake = self.logits(batch.x0, batch, step, "real"), self.logits(step.kept["sample"], batch, step, "fake")
        losses = [hinge_discriminator_loss(*pair) for pair in zip(real, fake, strict=True)]
        return {"discriminator": over_tokens(losses).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def logits(self, x: Tensor, batch: Batch, step: Step, name: str) -> list[Tensor]:
        """K maps of logits, (B, N) each, of x, noised to a level of its own."""
        s = self.level(step.uniform(f"{name} s"))
        noised = self.schedule.add_noise(x, step.normal(f"{name} noise", batch.shape), s)
        return self.discriminator(noised, s, batch.cond)

    def level(self, u: Tensor) -> Tensor:
        """s (B,): logit-normal as a flow's sigma."""
        return self.schedule.time_at(RectifiedFlow().angle(self.logit_normal(u)))
