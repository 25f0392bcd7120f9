"""AccVideo by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.base import Frozen, Heads, Trained
from ..methods.trajectory.accvideo import AccVideo
from .affine import Net, QuadraticHeads, TokenDiscriminator, mean_of_tokens, token_shares
from .paths import Algorithm, Known, Order, Path, Turn, rows, stepped
from .problem import Check, Problem

PATHS = (
    Path("the defaults", steps=5, nodes=5, elsewhere=True),
    Path("shapes/accvideo", {"nodes": 4}, steps=4, nodes=4, elsewhere=True),
    Path("toy/accvideo", {"nodes": 4, "gan_weight": 0.01}, steps=4, nodes=4, guidance=1.0, elsewhere=True),
    Path("2 steps on 4 nodes, critic_steps 3", {"nodes": 2, "critic_steps": 3}, steps=2, nodes=4),
    Path("1 step", {"nodes": 1}, steps=1),
    Path("1 step, 4 nodes", {"nodes": 4}, steps=1),
    Path("gan_weight 0.7", {"nodes": 2, "gan_weight": 0.7}, steps=2),
    Path("no heads", {"nodes": 2, "gan_weight": 0.0}, steps=2),
    Path("a range of scales", {"nodes": 2}, steps=2, guidance=(1.5, 4.0)),
)


def leg(turn: Turn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From where, to where, and when: of k even steps one that is drawn."""
    k, pairs = turn.path.steps, turn.batch.pairs
    j = (turn.step.uniform("leg") * k).floor().long()
    every = turn.path.nodes // k
    states = [pairs.noise.flatten(1), *(pairs.nodes[:, every * (i + 1) - 1].flatten(1) for i in range(k))]
    at = lambda which: torch.stack(states, 1)[torch.arange(len(j)), which]
    return at(j), at(j + 1), 1 - j.double() / k, 1 - (j + 1).double() / k


def landed(turn: Turn) -> tuple[Tensor, Tensor]:
    """Where the student's step ends, and how much of x_0 that holds."""
    x_t, _, t, r = leg(turn)
    return stepped(turn.problem, turn.roles["student"].x0(x_t, t, turn.text), x_t, t, r)


def judged(turn: Turn, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The time at which x is judged, and its logits at all positions."""
    r = r.clamp(min=0.001)
    with torch.no_grad():
        return r, torch.cat(turn.roles["discriminator"](x, r, Condition(text=turn.text)), 1)


def known(turn: Turn) -> Known:
    return of_student(turn) if turn.trains == ("student",) else of_heads(turn)


def of_student(turn: Turn) -> Known:
    s, k, (x_t, x_r, t, r), (x, share) = turn.settings, turn.path.steps, leg(turn), landed(turn)
    off = x - x_r
    values, pull = {"regression": k**2 * off.square().mean()}, k**2 * 2 * off / off.numel()
    if s.gan_weight:
        _, logits = judged(turn, x, r)
        values["gan"] = -s.gan_weight * mean_of_tokens(logits)
        even = -s.gan_weight * token_shares(len(x)).expand_as(logits)
        pull = pull + QuadraticHeads(turn.roles["discriminator"].numbers).back(even, x)
    slopes = turn.roles["student"].slopes(share[:, None] * pull, x_t, t, turn.text)
    return Known(values, {"student": slopes}, unchecked=("discriminator",))


def of_heads(turn: Turn) -> Known:
    """A hinge on each side: what lies within the margin pulls."""
    first = turn.before or turn
    x_r, r = leg(first)[1], leg(first)[3]
    value, slope = torch.zeros(()), 0
    for x, sign in ((x_r, 1), (landed(first)[0], -1)):
        at, logits = judged(turn, x, r)
        short = 1 - sign * logits
        value = value + mean_of_tokens(short.clamp(min=0))
        pull = -sign * (short > 0).double() * token_shares(len(x))
        slope = slope + QuadraticHeads(turn.roles["discriminator"].numbers).slopes(pull, x, at[:, None], turn.text)
    return Known({"discriminator": value}, {"discriminator": slope})


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {name: Net.of(problem) for name in ("teacher", "student")}
    return found | ({"discriminator": TokenDiscriminator.of(problem)} if settings.gan_weight else {})


def orders(settings: Any) -> list[Order]:
    count = settings.critic_steps
    return [Order(("student",)), *([Order(("discriminator",), count, count)] if settings.gan_weight else [])]


def needs(settings: Any) -> dict[str, Any]:
    heads = {"discriminator": Heads("teacher", kind="tokens", nodes=settings.nodes)} if settings.gan_weight else {}
    return {"teacher": Frozen(), "student": Trained("teacher"), **heads}


ALGORITHM = Algorithm(AccVideo, roles, orders, needs, known,
                      defaults={"nodes": 5, "gan_weight": 0.1, "critic_steps": 1}, renoised=False)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
