"""SDXL-Lightning by hand, on each path of its settings: the guided teacher's steps, all starts, the game."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.adversarial.lightning import Lightning
from ..methods.base import Frozen, Heads, Trained
from .affine import Net, QuadraticHeads, softplus
from .paths import Algorithm, Known, Order, Path, Turn, rows, stepped
from .problem import Check, Problem

SHOWN = (0.01, 0.25, 0.5, 0.75)         # discriminator_times, as published
SHAPES, TOY = {"nodes": 16, "discriminator_times": SHOWN}, {"objective": "pair", "nodes": 8,
                                                            "discriminator_times": (0.1, 0.25, 0.5)}
PATHS = (
    Path("the defaults", steps=4, elsewhere=True),
    Path("shapes/lightning, first stage, mse", SHAPES | {"objective": "mse"}, steps=4, elsewhere=True),
    Path("shapes/lightning, second stage, pair", SHAPES | {"objective": "pair"}, steps=4, elsewhere=True),
    Path("toy/lightning, not guided", TOY, steps=2, guidance=1.0, elsewhere=True),
    Path("single", {"objective": "single", "nodes": 8}, steps=2, elsewhere=True),
    Path("single, judged under noise", {"objective": "single", "nodes": 8, "discriminator_times": SHOWN}, steps=2),
    Path("mse of an unguided teacher", {"objective": "mse", "nodes": 8}, steps=4, guidance=1.0),
    Path("a range of guidance, mse", {"objective": "mse", "nodes": 8}, steps=2, guidance=(1.5, 4.0)),
    Path("a range of guidance, pair", {"nodes": 8}, steps=2, guidance=(1.5, 4.0)),
    Path("a teacher with its guidance within, pair", {"nodes": 8}, steps=2, within=True),
    Path("a teacher with its guidance within, mse", {"objective": "mse", "nodes": 8}, steps=2, within=True),
    Path("nodes 4, as many as steps", {"nodes": 4}, steps=4),
    Path("starts of twice the steps, mse", {"objective": "mse", "nodes": 8, "starts": 4}, steps=2, elsewhere=True),
    Path("starts of twice the steps, pair", {"nodes": 8, "starts": 4}, steps=2),
    Path("starts of four times the steps, single, judged under noise",
         {"objective": "single", "nodes": 8, "starts": 8, "discriminator_times": SHOWN}, steps=2),
    Path("one step from four starts, pair, judged under noise", {"nodes": 8, "starts": 4, "discriminator_times": SHOWN},
         steps=1),
    Path("judged at one level", {"nodes": 8, "discriminator_times": (0.3,)}, steps=2),
)


@dataclass
class QuadraticDiscriminator:
    """Quadratic heads on the landing alone, or on the landing and where it came from, told the levels of both."""

    numbers: dict[str, Tensor]

    def __call__(self, x_r: Tensor, r: Tensor, cond: Condition) -> Tensor:
        return QuadraticHeads(self.numbers)(x_r.flatten(1), r[:, None], cond)

    def pair(self, x_r: Tensor, r: Tensor, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return QuadraticHeads(self.numbers)(torch.cat([x_r, x_t], 1).flatten(1), torch.stack([r, t], 1), cond)


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"teacher": Net.of(problem), "student": Net.of(problem)}
    if settings.objective == "mse":
        return found
    seen = 2 if settings.objective == "pair" else 1
    heads = QuadraticHeads.of(problem, seen * problem.dim, levels=seen)
    return found | {"critic": Net.of(problem), "discriminator": QuadraticDiscriminator(heads.numbers)}


@dataclass(frozen=True)
class Start:
    """Where a student's step begins, x_t (B, D) at t, and the time r that it lands at."""

    x_t: Tensor
    t: Tensor
    r: Tensor


def start(turn: Turn) -> Start:
    s, schedule, noise = turn.settings, turn.problem.schedule, turn.noise("noise")
    count = s.starts or turn.path.steps
    t = ((turn.step.uniform("start") * count).floor() + 1) / count
    x_t = schedule.alpha(t)[:, None] * turn.x0 + schedule.sigma(t)[:, None] * noise
    return Start(torch.where(t[:, None] == 1, noise, x_t), t, (t - 1 / turn.path.steps).clamp(min=0))


def taught(turn: Turn, begun: Start) -> Tensor:
    """Sample by sample: the guided teacher's steps of 1 / nodes from t down to r, not one more."""
    text, count, ends = turn.guided(turn.scale), turn.settings.nodes, []
    for i in range(len(begun.t)):
        x, place = begun.x_t[i:i + 1], round(begun.t[i].item() * count)
        for node in range(place, round(begun.r[i].item() * count), -1):
            t, r = (torch.tensor([n / count], dtype=torch.float64) for n in (node, node - 1))
            x, _ = stepped(turn.problem, turn.roles["teacher"].x0(x, t, text[i:i + 1]), x, t, r)
        ends.append(x)
    return torch.cat(ends)


def landed(turn: Turn, begun: Start) -> tuple[Tensor, Tensor]:
    return stepped(turn.problem, turn.roles["student"].x0(begun.x_t, begun.t, turn.text), begun.x_t, begun.t, begun.r)


@torch.no_grad()
def logits_of(turn: Turn, begun: Start, x_r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, levels and logits of a landing, and how much of it they hold: on the data it is noised by
    discriminator_times."""
    at, schedule, discriminator = turn.settings.discriminator_times, turn.problem.schedule, turn.roles["discriminator"]
    s, kept, on_data = begun.r, torch.ones_like(begun.r), begun.r == 0
    if at:
        drawn = torch.tensor(at, dtype=torch.float64)[(turn.step.uniform("judged s") * len(at)).long()]
        s = torch.where(on_data, drawn, s)
        kept = torch.where(on_data, schedule.alpha(s), 1)
        x_r = torch.where(on_data[:, None], turn.noised(x_r, s, "judged noise"), x_r)
    else:
        s = torch.where(on_data, 1 / 1000, s)
    pair = turn.settings.objective == "pair"
    z = torch.cat([x_r, begun.x_t], 1) if pair else x_r
    levels = torch.stack([s, begun.t], 1) if pair else s[:, None]
    return z, levels, QuadraticHeads(discriminator.numbers)(z, levels, Condition(text=turn.text)), kept


def known(turn: Turn) -> Known:
    if turn.trains == ("critic", "discriminator"):
        return of_heads(turn)
    begun, student, dim = start(turn), turn.roles["student"], turn.problem.dim
    x_r, share = landed(turn, begun)
    if turn.settings.objective == "mse":
        off = x_r - taught(turn, begun)
        value, pull, unchecked = {"mse": off.square().mean()}, 2 * off / off.numel(), ()
    else:
        z, _, logits, kept = logits_of(turn, begun, x_r)
        back = QuadraticHeads(turn.roles["discriminator"].numbers).back(-torch.sigmoid(-logits) / logits.numel(), z)
        value, pull = {"gan": softplus(-logits).mean()}, kept[:, None] * back[:, :dim]
        unchecked = ("critic", "discriminator")
    return Known(value, {"student": student.slopes(share[:, None] * pull, begun.x_t, begun.t, turn.text)}, unchecked)


def of_heads(turn: Turn) -> Known:
    begun, value, slope = start(turn.before), torch.zeros(()), 0
    heads = QuadraticHeads(turn.roles["discriminator"].numbers)
    for x_r, sign in ((taught(turn, begun), -1), (landed(turn, begun)[0], 1)):
        z, levels, logits, _ = logits_of(turn, begun, x_r)
        value = value + softplus(sign * logits).mean()
        slope = slope + heads.slopes(sign * torch.sigmoid(sign * logits) / logits.numel(), z, levels, turn.text)
    return Known({"discriminator": value}, {"discriminator": slope}, unchecked=("critic",))


def orders(settings: Any) -> list[Order]:
    game = [Order(("critic", "discriminator"), shares=1)]
    return [Order(("student",)), *([] if settings.objective == "mse" else game)]


def needs(settings: Any) -> dict[str, Any]:
    found = {"teacher": Frozen(), "student": Trained("teacher")}
    if settings.objective == "mse":
        return found
    return found | {"critic": Trained("teacher"), "discriminator": Heads("critic", pair=settings.objective == "pair")}


ALGORITHM = Algorithm(
    Lightning, roles, orders, needs, known,
    defaults={"objective": "pair", "starts": None, "discriminator_times": ()},
    renoised=False,
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
