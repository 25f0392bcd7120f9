"""SiD by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.base import Frozen, Heads, Trained
from ..methods.distribution.sid import SiD
from .affine import TOKENS, Net, QuadraticHeads, mean_of_tokens, softplus, token_shares
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, denoised, laws, noise_level, output_scale, rolled, rows
from .problem import Check, Problem

MANY = (0, 1, 2, 3)                     # moments, so that exits differ
TOY = {"alpha": 0.5, "critic_steps": 3, "t_range": (0.02, 0.9)}
SHAPES = {"alpha": 1.2, "critic_training_guidance": 1.0, "critic_steps": 2}
PATHS = (
    Path("the defaults", moments=(0, 1), elsewhere=True),
    Path("the defaults at 4 steps", steps=4, moments=MANY),
    Path("shapes/sid, begun at 0.625, a critic that is not guided", SHAPES | {"start_time": 0.625}, elsewhere=True),
    Path("a critic that is not guided", {"critic_training_guidance": 1.0}, elsewhere=True),
    Path("Zero-CFG, a critic without prompts", {"critic_training_guidance": 0.0}, guidance=1.0, moments=(0, 1),
         elsewhere=True),
    Path("Zero-CFG at 4 steps with images, as published", {"critic_training_guidance": 0.0, "gan_weight": 0.01},
         steps=4,
         guidance=1.0, moments=(0, 1, 155, 156)),
    Path("Anti-CFG, a critic at -1", {"critic_training_guidance": -1.0}, guidance=1.0, moments=(0, 1), elsewhere=True),
    Path("a critic trained at -0.5, used at 0", {"critic_training_guidance": -0.5, "critic_guidance": 0.0,
                                                 "drop": 0.5}),
    Path("images, from the second update, a guided critic", {"gan_weight": 0.7, "gan_start": 1}, moments=(0, 1, 2),
         elsewhere=True),
    Path("images, critic_gan_weight 0.9, exit embedding, half of the prompts dropped",
         {"gan_weight": 0.7, "gan_start": 0, "critic_gan_weight": 0.9, "exit_embedding": True, "drop": 0.5}, steps=2,
         moments=MANY),
    Path("toy/sid, exit embedding, four exits, not guided", TOY | {"exit_embedding": True}, steps=4,
         guidance=1.0, moments=MANY,
         elsewhere=True),
    Path("toy/sid-1step, not guided", TOY, guidance=1.0, elsewhere=True),
    Path("a range of guidance, its middle for the critic", guidance=(1.5, 4.0), moments=(0, 1)),
    Path("alpha 1.2", {"alpha": 1.2}),
    Path("alpha 0", {"alpha": 0.0}),
    Path("a critic trained and used at 1.7", {"critic_training_guidance": 1.7}),
    Path("a critic used at 2.3, trained at the teacher's", {"critic_guidance": 2.3}),
    Path("a critic trained at 1, used at 2.3, of an unguided teacher",
         {"critic_training_guidance": 1.0, "critic_guidance": 2.3, "drop": 0.5}, guidance=1.0),
    Path("a critic trained at 2.3, used at 1",
         {"critic_training_guidance": 2.3, "critic_guidance": 1.0, "drop": 0.5}),
    Path("critic_steps 3", {"critic_steps": 3}),
    Path("exit embedding, guided, half of the prompts dropped", {"exit_embedding": True, "drop": 0.5},
         steps=2, moments=MANY),
    Path("drop 0", {"drop": 0.0}),
    Path("t_range from 0.3 to 0.6", {"t_range": (0.3, 0.6)}),
    Path("t_range to 1", {"t_range": (0.0, 1.0)}),
    *laws(),
)


def scales(turn: Turn) -> tuple[float, float]:
    """Of guidance, at which the critic is trained and asked."""
    s, w = turn.settings, turn.problem.w if turn.path.guidance is None else turn.path.guidance
    own = w if isinstance(w, float) else (w[0] + w[1]) / 2
    trained = own if s.critic_training_guidance is None else s.critic_training_guidance
    return trained, trained if s.critic_guidance is None else s.critic_guidance


def known(turn: Turn) -> Known:
    s, t = turn.settings, noise_level(turn, turn.step.uniform("t"))
    trained, matched = scales(turn)
    if turn.trains == ("critic",):                                # of its own sample; both see the prompt, or neither
        dropped = turn.step.uniform("drop") < (0 if trained == matched == 1 or trained == matched == 0 else s.drop)
        text = torch.where(dropped[:, None], turn.null, turn.text)
        sample = rolled(turn, text)
        w = sample.exit if s.exit_embedding else None
        value, slope = denoised(turn, sample.x, t, turn.guided(trained, text), output_scale(turn, t) ** 2, w)
        return images_told(turn, Known({"denoising": value}, {"critic": slope}), sample.x, t, text, w)
    sample, (teacher, student, critic) = rolled(turn), (turn.roles[name] for name in ("teacher", "student", "critic"))
    x_t, alpha = turn.noised(sample.x, t), turn.problem.schedule.alpha(t)[:, None]
    real = teacher.x0(x_t, t, turn.guided(turn.scale))
    fake = critic.x0(x_t, t, turn.guided(matched), sample.exit if s.exit_embedding else None)
    weight, d = 1 / (sample.x - real).abs().mean(1, keepdim=True), real - fake
    # L = (1 - a) |d|^2 + <d, fake - x>: its slopes in real, in fake, and in x itself; both networks lead on to x_t
    of_real = 2 * (1 - s.alpha) * d + fake - sample.x
    pull = alpha * (teacher.back(weight * of_real, t) + critic.back(weight * (d - of_real), t)) - weight * d
    values = {"identity": (weight * ((1 - s.alpha) * d**2 + d * (fake - sample.x))).mean()}
    pull = pull / d.numel()
    if s.gan_weight:
        w, begun = sample.exit if s.exit_embedding else None, float(turn.step.index >= s.gan_start)
        logits, features, within = judged(turn, x_t, t, turn.text, w)
        values["gan"] = s.gan_weight * begun * mean_of_tokens(weight * softplus(-logits))
        fooled = -s.gan_weight * begun * weight * torch.sigmoid(-logits) * within * token_shares(len(x_t))
        pull = pull + alpha * critic.back(turn.roles["discriminator"].heads.back(fooled, features), t)
    return Known(values, {"student": student.slopes(pull, sample.given, sample.t, turn.text)},
                 unchecked=("teacher", "critic", "discriminator"))


@torch.no_grad()
def judged(turn: Turn, x_t: Tensor, t: Tensor, text: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at all positions, (B, 5), cut off at -10 and 10; the critic's features of which they are; 1 where nothing
    was cut off, beyond which no slope leads, else 0."""
    logits = torch.cat(turn.roles["discriminator"](x_t, t, Condition(text=text, w=w)), 1)
    return logits.clamp(-10, 10), turn.roles["critic"].x0(x_t, t, text, w), (logits.abs() <= 10).double()


def images_told(turn: Turn, known: Known, x: Tensor, t: Tensor, text: Tensor, w: Tensor | None) -> Known:
    """With the critic's part of the game, where there is one: image and sample under one noise, at one level."""
    s, critic = turn.settings, turn.roles["critic"]
    if not s.gan_weight:
        return known
    value, slope = torch.zeros(()), known.slopes["critic"]
    for clean, sign in ((turn.x0, -1), (x, 1)):
        x_t = turn.noised(clean, t)
        logits, features, within = judged(turn, x_t, t, text, w)
        value = value + s.critic_gan_weight * mean_of_tokens(softplus(sign * logits))
        pull = s.critic_gan_weight * sign * torch.sigmoid(sign * logits) * within * token_shares(len(x_t))
        slope = slope + critic.slopes(turn.roles["discriminator"].heads.back(pull, features), x_t, t, text, w)
    return Known({**known.values, "discriminator": value}, {"critic": slope}, unchecked=("discriminator",))


@dataclass
class OnCritic:
    """Logits of the critic's features, here its x_0, at the positions of two maps, through no weights that train."""

    critic: Net
    heads: QuadraticHeads

    @property
    def numbers(self) -> dict[str, Tensor]:
        return self.heads.numbers

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        features = self.critic(x_t, t, cond).x0.flatten(1)
        return list(self.heads(features, 0 * t[:, None], Condition(text=0 * cond.text)).split(TOKENS, 1))


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {name: Net.of(problem) for name in ("teacher", "student", "critic")}
    heads = QuadraticHeads.of(problem, problem.dim, count=sum(TOKENS))
    heads.numbers["Q"].data *= 0.1                                # logits far from where they are cut off
    return found | ({"discriminator": OnCritic(found["critic"], heads)} if settings.gan_weight else {})


def needs(settings: Any) -> dict[str, Any]:
    critic = Trained("teacher", reads=("w",) if settings.exit_embedding else ())
    found = {"teacher": Frozen(), "student": Trained("teacher"), "critic": critic}
    return found | ({"discriminator": Heads("critic", kind="channels")} if settings.gan_weight else {})


ALGORITHM = Algorithm(
    SiD,
    roles=roles,
    orders=lambda settings: [Order(("critic",), repeat=settings.critic_steps), Order(("student",))],
    needs=needs,
    known=known,
    defaults={"alpha": 1.0, "critic_training_guidance": None, "critic_guidance": None, "critic_steps": 1, "drop": 0.1,
              "gan_weight": 0.0, "critic_gan_weight": 0.5, "gan_start": 156, **NOISE},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
