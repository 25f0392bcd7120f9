"""DMD2 by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..diffusion.prediction import Prediction
from ..methods.base import Frozen, Heads, Trained
from ..methods.distribution.dmd2 import DMD2
from .affine import Net, QuadraticHeads, softplus
from .paths import (
    NOISE,
    Algorithm,
    Known,
    Order,
    Path,
    Sample,
    Turn,
    denoised,
    laws,
    noise_level,
    output_scale,
    rolled,
    rows,
)
from .problem import Check, Problem

MANY = (0, 1, 2, 3)                     # moments, so that exits differ
SHARED, TOLD = {"critic_steps": 2, "share_rollout": True}, {"exit_embedding": True}
TOY = {"critic_steps": 3, "share_rollout": True, "gan_weight": 0.0}
PATHS = (
    Path("the defaults", elsewhere=True),
    Path("the defaults at 4 steps", steps=4, moments=MANY),
    Path("shapes/dmd2, shapes-sd3/dmd2", SHARED, steps=4, moments=MANY, elsewhere=True),
    Path("shapes/dmd2-1step", SHARED, elsewhere=True),
    Path("toy/dmd2, exit embedding, four exits, not guided",
         TOY | TOLD | {"noise_law": "mixture", "t_range": (0.02, 0.9)}, steps=4, guidance=1.0,
         moments=MANY, elsewhere=True),
    Path("toy/hyper, exit embedding, eight exits, not guided",
         TOY | TOLD | {"noise_law": "mixture", "t_range": (0.02, 0.9)}, steps=8, guidance=1.0,
         moments=(0, 1), elsewhere=True),
    Path("shapes/hyper, eight exits", SHARED, steps=8, moments=(0, 1), elsewhere=True),
    Path("toy/dmd2-1step, not guided", TOY | {"t_range": (0.02, 0.7)}, guidance=1.0, elsewhere=True),
    Path("a range of guidance", {"critic_steps": 1}, guidance=(1.5, 4.0)),
    Path("critic_steps 3, fresh samples after the first", {"critic_steps": 3}, steps=2, moments=MANY),
    Path("share_rollout with an exit embedding", TOLD | {"critic_steps": 3, "share_rollout": True},
         steps=2, moments=MANY),
    Path("exit embedding, fresh samples, with the discriminator", TOLD | {"critic_steps": 3}, steps=4, moments=MANY),
    Path("a teacher with its guidance within", {"critic_steps": 1}, within=True),
    Path("no discriminator", {"gan_weight": 0.0}, elsewhere=True),
    Path("sd15/dmd2 and its kin, prompts alone", {"gan_weight": 0.0}, steps=4, moments=MANY, elsewhere=True),
    Path("flux1-dev/dmd2 and its kin, shifted levels", {"gan_weight": 0.0, "noise_law": "shifted"}, steps=4,
         moments=MANY, elsewhere=True),
    Path("gan_weight 0.7", {"gan_weight": 0.7, "critic_steps": 1}),
    Path("critic_gan_weight 0.9", {"critic_gan_weight": 0.9, "critic_steps": 1}),
    Path("t_range from 0.3 to 0.6", {"t_range": (0.3, 0.6), "critic_steps": 1}),
    Path("decoupled, four exits", {"decoupled": True, "critic_steps": 1}, steps=4, moments=MANY, elsewhere=True),
    Path("decoupled, a range of guidance, without the discriminator",
         {"decoupled": True, "critic_steps": 1, "gan_weight": 0.0, "noise_law": "mixture"}, steps=2,
         guidance=(1.5, 4.0), moments=MANY),
    Path("decoupled, begun at 0.375", {"decoupled": True, "critic_steps": 1, "start_time": 0.375}),
    Path("t_range to 1", {"t_range": (0.0, 1.0), "critic_steps": 1}),
    *laws(critic_steps=1),
)


@dataclass
class OnCritic:
    """A discriminator on the critic's features, here its x_0: quadratic heads, told the level and the condition."""

    critic: Net
    heads: QuadraticHeads

    @property
    def numbers(self) -> dict[str, Tensor]:
        return self.heads.numbers

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.with_prediction(x_t, t, cond)[1]

    def with_prediction(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Prediction, Tensor]:
        prediction = self.critic(x_t, t, cond)
        return prediction, self.heads(prediction.x0.flatten(1), t[:, None], cond)


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {name: Net.of(problem) for name in ("teacher", "student", "critic")}
    discriminator = OnCritic(found["critic"], QuadraticHeads.of(problem, problem.dim))
    return found | ({"discriminator": discriminator} if settings.gan_weight else {})


def known(turn: Turn) -> Known:
    return of_student(turn) if turn.trains == ("student",) else of_critic(turn)


def of_student(turn: Turn) -> Known:
    s, sample, student, critic = turn.settings, rolled(turn), turn.roles["student"], turn.roles["critic"]
    w, t = sample.exit if s.exit_embedding else None, noise_level(turn, turn.step.uniform("t"))
    x_t = turn.noised(sample.x, t)
    real = turn.roles["teacher"].x0(x_t, t, turn.text if s.decoupled else turn.guided(turn.scale))
    fake = critic.x0(x_t, t, turn.text, w)
    pull = (fake - real) / (sample.x - real).abs().mean(1, keepdim=True) / real.numel()
    values: dict[str, Tensor | None] = {"matching": None}
    if s.decoupled:
        pull, values = pull + added(turn, sample), values | {"guidance": None}
    if not s.gan_weight:
        return Known(values, {"student": student.slopes(pull, sample.given, sample.t, turn.text)})
    heads, logits = turn.roles["discriminator"].heads, logits_at(turn, x_t, t, w)
    fooled = -s.gan_weight * torch.sigmoid(-logits) / logits.numel()
    pull = pull + turn.problem.schedule.alpha(t)[:, None] * critic.back(heads.back(fooled, fake), t)
    value = s.gan_weight * softplus(-logits).mean()
    return Known(values | {"gan": value}, {"student": student.slopes(pull, sample.given, sample.t, turn.text)},
                 unchecked=("critic", "discriminator"))


def added(turn: Turn, sample: Sample) -> Tensor:
    """The pull of what guidance adds, at i / 1000 below the exit's own time, of two that are as near the lower."""
    share = noise_level(turn, turn.step.uniform("guidance t"))
    t = (1000 * sample.t * share - 1e-6).round().clamp(min=1) / 1000
    x_t, teacher = turn.noised(sample.x, t, "guidance noise"), turn.roles["teacher"]
    given, without = (teacher.x0(x_t, t, turn.guided(w)) for w in (turn.scale, 1.0))
    return (without - given) / (sample.x - given).abs().mean(1, keepdim=True) / given.numel()


@torch.no_grad()
def logits_at(turn: Turn, x_t: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    return turn.roles["discriminator"](x_t, t, Condition(text=turn.text, w=w))


def of_critic(turn: Turn) -> Known:
    s, critic, t = turn.settings, turn.roles["critic"], noise_level(turn, turn.step.uniform("t"), whole=True)
    sample = rolled(turn.before or turn)                          # the student's own where it is shared
    w = sample.exit if s.exit_embedding else None
    value, slope = denoised(turn, sample.x, t, turn.text, output_scale(turn, t) ** 2, w)
    if not s.gan_weight:
        return Known({"denoising": value}, {"critic": slope})
    heads, t_real = turn.roles["discriminator"].heads, noise_level(turn, turn.step.uniform("real t"), whole=True)
    game, slope_of_heads = torch.zeros(()), 0
    fake, real = turn.noised(sample.x, t), turn.noised(turn.x0, t_real, "real noise")
    for x_t, at, sign in ((fake, t, 1), (real, t_real, -1)):
        logits, features = logits_at(turn, x_t, at, w), critic.x0(x_t, at, turn.text, w)
        game = game + s.critic_gan_weight * softplus(sign * logits).mean()
        pull = s.critic_gan_weight * sign * torch.sigmoid(sign * logits) / logits.numel()
        slope_of_heads = slope_of_heads + heads.slopes(pull, features, at[:, None], turn.text, w)
        slope = slope + critic.slopes(heads.back(pull, features), x_t, at, turn.text, w)
    return Known({"denoising": value, "discriminator": game}, {"critic": slope, "discriminator": slope_of_heads})


def orders(settings: Any) -> list[Order]:
    trains = ("critic", "discriminator") if settings.gan_weight else ("critic",)
    count = settings.critic_steps
    return [Order(("student",)), Order(trains, count, count if settings.share_rollout else 1)]


def needs(settings: Any) -> dict[str, Any]:
    critic = Trained("teacher", reads=("w",) if settings.exit_embedding else ())
    found = {"teacher": Frozen(), "student": Trained("teacher"), "critic": critic}
    return found | ({"discriminator": Heads("critic")} if settings.gan_weight else {})


ALGORITHM = Algorithm(
    DMD2, roles, orders, needs, known,
    defaults={"critic_steps": 5, "share_rollout": False, "exit_embedding": False, "decoupled": False, **NOISE,
              "gan_weight": 5e-3, "critic_gan_weight": 1e-2},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
