"""PCM by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Frozen, Heads, Trained
from ..methods.consistency.pcm import PCM
from .affine import Net, QuadraticHeads, TokenDiscriminator, mean_of_tokens, token_shares
from .paths import Algorithm, Known, Order, Path, Turn, rows
from .problem import Check, Problem
from .segments import judged, landings

PATHS = (
    Path("the defaults", steps=4, elsewhere=True),
    Path("shapes/pcm", {"nodes": 40}, steps=4, elsewhere=True),
    Path("toy/pcm", {"nodes": 40, "loss": "squared"}, steps=4, guidance=1.0, elsewhere=True),
    Path("1 phase", {"nodes": 10}, steps=1),
    Path("2 phases of 9 nodes", {"nodes": 9}, steps=2),
    Path("a node a phase", {"nodes": 5}, steps=5),
    Path("squared", {"loss": "squared"}, steps=2),
    Path("Huber, c = 0.3", {"huber_c": 0.3}, steps=2),
    Path("gan_weight 2", {"gan_weight": 2.0}, steps=2),
    Path("no heads", {"gan_weight": 0.0}, steps=2),
    Path("a range of scales", steps=2, guidance=(1.5, 4.0)),
    Path("a teacher with its guidance within", steps=2, within=True),
)


def times(turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """t uniform on the ends of the teacher's steps and of the phases, s the next of them below, r the phase's start."""
    n, k = turn.settings.nodes, turn.path.steps
    ends = sorted({i * k for i in range(n + 1)} | {j * n for j in range(k + 1)})            # in units of 1 / (n k)
    i = 1 + (turn.step.uniform("node") * (len(ends) - 1)).floor().long()
    whole = torch.tensor(ends)
    t, s = whole[i], whole[i - 1]
    r = (t - 1) // n * n
    return tuple(u.double() / (n * k) for u in (t, s, r))


def known(turn: Turn) -> Known:
    s = turn.settings
    if turn.trains == ("student",):
        x_r, target, r, x_t, t, share = landings(turn, *times(turn))
        off = x_r - target
        root = (off.square() + s.huber_c**2).sqrt()
        value = off.square().mean() if s.loss == "squared" else (root - s.huber_c).mean()
        pull = (2 * off if s.loss == "squared" else off / root) / off.numel()
        values = {"consistency": value}
        if s.gan_weight:
            x, _, kept, logits = judged(turn, x_r, r)
            values["gan"] = s.gan_weight * mean_of_tokens((1 - logits).clamp(min=0))
            slope = -s.gan_weight * (logits < 1).double() * token_shares(len(x))
            pull = pull + kept[:, None] * QuadraticHeads(turn.roles["discriminator"].numbers).back(slope, x)
        slopes = turn.roles["student"].slopes(share[:, None] * pull, x_t, t, turn.text)
        return Known(values, {"student": slopes}, unchecked=("discriminator",))
    fake, real, r, *_ = landings(turn.before, *times(turn.before))
    value, slope = torch.zeros(()), 0
    for x_r, sign in ((real, 1), (fake, -1)):
        x, time, _, logits = judged(turn, x_r, r)
        short = 1 - sign * logits                                 # of the margin
        value = value + mean_of_tokens(short.clamp(min=0))
        pull = -sign * (short > 0).double() * token_shares(len(x))
        slope = slope + QuadraticHeads(turn.roles["discriminator"].numbers).slopes(pull, x, time[:, None], turn.text)
    return Known({"discriminator": value}, {"discriminator": slope})


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"teacher": Net.of(problem), "student": Net.of(problem)}
    return found | ({"discriminator": TokenDiscriminator.of(problem)} if settings.gan_weight else {})


ALGORITHM = Algorithm(
    PCM,
    roles,
    orders=lambda settings: [Order(("student",)),
                             *([Order(("discriminator",), shares=1)] if settings.gan_weight else [])],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"),
                            **({"discriminator": Heads("teacher", kind="tokens")} if settings.gan_weight else {})},
    known=known,
    defaults={"nodes": 50, "loss": "huber", "huber_c": 0.001, "gan_weight": 0.1},
    renoised=False,
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
