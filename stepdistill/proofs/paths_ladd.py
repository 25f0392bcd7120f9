"""LADD by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.adversarial.ladd import LADD
from ..methods.base import Frozen, Heads, Trained
from .affine import Net, QuadraticHeads, TokenDiscriminator, mean_of_tokens, token_shares
from .paths import Algorithm, Known, Order, Path, Turn, rows
from .problem import Check, Problem

ENDS = (0, 60, 499, 500)                # moments: of the warm-up's end at its default
TOY = {"warmup_updates": 0, "mean": -1.0, "shares": (1.0,), "warmup_shares": (1.0,)}
PATHS = (
    Path("the defaults, before and after the warm-up", moments=ENDS, steps=4, elsewhere=True),
    Path("shapes/ladd", {"warmup_updates": 150, "mean": -1.0, "shares": (0.25,) * 4, "critic_steps": 2},
         moments=(0, 149, 150),
         steps=4, elsewhere=True),
    Path("toy/ladd, one node", TOY, moments=ENDS, guidance=1.0, elsewhere=True),
    Path("no warm-up", {"warmup_updates": 0}, moments=ENDS, steps=2),
    Path("a warm-up of 1", {"warmup_updates": 1}, moments=(0, 1), steps=4),
    Path("even shares", {"warmup_updates": 0, "shares": (0.25,) * 4}, moments=ENDS, steps=4),
    Path("warmup_shares of noise alone", {"warmup_shares": (1.0, 0.0, 0.0, 0.0)}, moments=(0, 499), steps=4),
    Path("two nodes", {"shares": (0.3, 0.7), "warmup_shares": (0.9, 0.1)}, moments=ENDS, steps=2),
    Path("mean -1", {"mean": -1.0}),
    Path("std 0.4", {"std": 0.4}),
    Path("critic_steps 3, all on one sample", {"critic_steps": 3}),
)


def drawn_from(u: Tensor, shares: Sequence[float]) -> Tensor:
    """Of the times 1, 1 - 1 / n, ..., each with its share, by their place u in [0, 1)."""
    t, below = torch.zeros_like(u), 0.0
    for i, share in enumerate(shares):
        t = torch.where((below <= u) & (u < below + share), 1 - i / len(shares), t)
        below += share
    return t


def level(turn: Turn, name: str) -> Tensor:
    """The time whose sigma / (alpha + sigma) is the sigmoid of a normal number."""
    sigma = torch.sigmoid(turn.settings.mean + turn.settings.std * torch.special.ndtri(turn.step.uniform(f"{name} s")))
    return turn.problem.schedule.time_at((sigma / (1 - sigma)).atan())


def sample(turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """The student's x_0, what it is given, and the time."""
    s, schedule, noise = turn.settings, turn.problem.schedule, turn.noise("start")
    t = drawn_from(turn.step.uniform("t"), s.warmup_shares if turn.step.index < s.warmup_updates else s.shares)
    x_t = schedule.alpha(t)[:, None] * turn.x0 + schedule.sigma(t)[:, None] * noise
    x_t = torch.where(t[:, None] == 1, noise, x_t)                # pure, whatever alpha is there
    return turn.roles["student"].x0(x_t, t, turn.text), x_t, t


def seen(turn: Turn, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """x noised, its level, and the heads' logits."""
    s = level(turn, name)
    x_s = turn.noised(x, s, f"{name} noise")
    with torch.no_grad():
        return x_s, s, torch.cat(turn.roles["discriminator"](x_s, s, Condition(text=turn.text)), 1)


def known(turn: Turn) -> Known:
    heads = QuadraticHeads(turn.roles["discriminator"].numbers)
    if turn.trains == ("student",):
        x, x_t, t = sample(turn)
        x_s, s, logits = seen(turn, x, "fake")
        pull = heads.back(-token_shares(len(x)).expand_as(logits), x_s) * turn.problem.schedule.alpha(s)[:, None]
        return Known({"gan": -mean_of_tokens(logits)},
                     {"student": turn.roles["student"].slopes(pull, x_t, t, turn.text)},
                     unchecked=("discriminator",))
    value, slope = torch.zeros(()), 0
    for x, name, sign in ((turn.x0, "real", 1), (sample(turn.before)[0], "fake", -1)):
        x_s, s, logits = seen(turn, x, name)
        short = 1 - sign * logits                                 # of the margin
        value = value + mean_of_tokens(torch.where(short > 0, short, 0))
        slope = slope + heads.slopes(-sign * (short > 0).double() * token_shares(len(x)), x_s, s[:, None], turn.text)
    return Known({"discriminator": value}, {"discriminator": slope})


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    return {"teacher": Net.of(problem), "student": Net.of(problem), "discriminator": TokenDiscriminator.of(problem)}


ALGORITHM = Algorithm(
    LADD,
    roles,
    orders=lambda settings: [Order(("student",)),
                             Order(("discriminator",), settings.critic_steps, shares=settings.critic_steps)],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"),
                            "discriminator": Heads("teacher", kind="tokens")},
    known=known,
    defaults={"shares": (0.7, 0.1, 0.1, 0.1), "warmup_shares": (0.0, 0.0, 0.5, 0.5), "warmup_updates": 500, "mean": 1.0,
              "std": 1.0},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
