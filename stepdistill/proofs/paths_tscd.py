"""TSCD by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Frozen, Heads, Need, Trained
from ..methods.consistency.tscd import TSCD
from .affine import Net, QuadraticDiscriminator, QuadraticHeads, softplus
from .paths import Algorithm, Known, Order, Path, Turn, rows
from .problem import Check, Problem
from .segments import judged, landings

ALONE = {"gan_weight": 0.0}
PATHS = (
    Path("the defaults", steps=4, elsewhere=True),
    Path("shapes/tscd, 8 segments", ALONE, steps=8, elsewhere=True),
    Path("shapes/tscd, 4 segments", {"gan_weight": 0.02}, steps=4, elsewhere=True),
    Path("toy/tscd, 8 segments", ALONE, steps=8, guidance=1.0, elsewhere=True),
    Path("toy/tscd, 4 segments", ALONE, steps=4, guidance=1.0, elsewhere=True),
    Path("1 segment", steps=1),
    Path("2 segments of 6 nodes", {"nodes": 6}, steps=2),
    Path("a node a segment", {"nodes": 5}, steps=5),
    Path("landing at the start", {"landing": "start"}, steps=2),
    Path("landing at the start of 1 segment", {"landing": "start", **ALONE}, steps=1),
    Path("mse_weight 0.2", {"mse_weight": 0.2}, steps=2),
    Path("the discriminator alone", {"mse_weight": 0.0}, steps=2),
    Path("gan_weight 2", {"gan_weight": 2.0}, steps=2),
    Path("a range of scales", steps=2, guidance=(1.5, 4.0)),
    Path("a teacher with its guidance within", steps=2, within=True),
)


def times(turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """t = i / n uniform, s = (i - 1) / n, r = j / n uniform from the start of the segment that holds t up to s."""
    n, k = turn.settings.nodes, turn.path.steps
    i = 1 + (turn.step.uniform("node") * n).floor()
    start = ((i - 1) * k / n).floor() * n / k
    j = start + (turn.step.uniform("landing") * (i - start)).floor()
    return i / n, (i - 1) / n, (start if turn.settings.landing == "start" else j) / n


def of_student(turn: Turn) -> Known:
    s, unchecked = turn.settings, ()
    x_r, target, r, x_t, t, share = landings(turn, *times(turn))
    off = x_r - target
    values, pull = {"consistency": s.mse_weight * off.square().mean()}, s.mse_weight * 2 * off / off.numel()
    if s.gan_weight:
        x, _, kept, logits = judged(turn, x_r, r)
        values["gan"] = s.gan_weight * softplus(-logits).mean()
        slope = -s.gan_weight * torch.sigmoid(-logits) / logits.numel()
        pull = pull + kept[:, None] * QuadraticHeads(turn.roles["discriminator"].numbers).back(slope, x)
        unchecked = ("critic", "discriminator")
    return Known(values, {"student": turn.roles["student"].slopes(share[:, None] * pull, x_t, t, turn.text)}, unchecked)


def of_heads(turn: Turn) -> Known:
    fake, real, r, *_ = landings(turn.before, *times(turn.before))
    value, slope = torch.zeros(()), 0
    for x_r, sign in ((real, -1), (fake, 1)):
        x, time, _, logits = judged(turn, x_r, r)
        value = value + softplus(sign * logits).mean()
        pull = sign * torch.sigmoid(sign * logits) / logits.numel()
        slope = slope + QuadraticHeads(turn.roles["discriminator"].numbers).slopes(pull, x, time[:, None], turn.text)
    return Known({"discriminator": value}, {"discriminator": slope}, unchecked=("critic",))


def known(turn: Turn) -> Known:
    return of_student(turn) if turn.trains == ("student",) else of_heads(turn)


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"teacher": Net.of(problem), "student": Net.of(problem)}
    if not settings.gan_weight:
        return found
    heads = QuadraticDiscriminator(QuadraticHeads.of(problem, problem.dim).numbers)
    return found | {"critic": Net.of(problem), "discriminator": heads}


def orders(settings: Any) -> list[Order]:
    return [Order(("student",)), *([Order(("critic", "discriminator"), shares=1)] if settings.gan_weight else [])]


def needs(settings: Any) -> dict[str, Need]:
    game: dict[str, Need] = {"critic": Trained("teacher"), "discriminator": Heads("critic")}
    return {"teacher": Frozen(), "student": Trained("teacher"), **(game if settings.gan_weight else {})}


ALGORITHM = Algorithm(
    TSCD, roles, orders, needs, known,
    defaults={"nodes": 40, "landing": "uniform", "mse_weight": 1.0, "gan_weight": 0.1},
    renoised=False,
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
