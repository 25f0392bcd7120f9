"""SCFlow by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.base import Follows, Frozen, Heads, Trained
from ..methods.consistency.scflow import SCFlow
from .affine import Net, QuadraticDiscriminator, QuadraticHeads, softplus
from .paths import Algorithm, Known, Order, Path, Turn, rows, stepped, stock_time
from .problem import Check, Problem

JOINED = {"warmup_updates": 0}
PATHS = (
    Path("the defaults, before and after the warm-up", steps=4, moments=(0, 999, 1000), elsewhere=True),
    Path("toy/scflow", {"anchor": 0.02, "gan_weight": 0.0, **JOINED}, steps=4, guidance=1.0, elsewhere=True,
         within=True),
    Path("1 step", JOINED, steps=1),
    Path("2 steps", JOINED, steps=2),
    Path("reach 0.3", {"reach": 0.3, **JOINED}, steps=2),
    Path("anchor 0.4", {"anchor": 0.4, **JOINED}, steps=2),
    Path("squared", {"loss": "squared", **JOINED}, steps=2),
    Path("Huber, c = 0.3", {"huber_c": 0.3, **JOINED}, steps=2),
    Path("high_weight 0.7", {"high_weight": 0.7, **JOINED}, steps=2),
    Path("self_weight 0.7", {"self_weight": 0.7, **JOINED}, steps=2),
    Path("gan_weight 0.7", {"gan_weight": 0.7, **JOINED}, steps=2),
    Path("no heads, in the warm-up", {"gan_weight": 0.0}, steps=2),
    Path("target_decay 0.5", {"target_decay": 0.5, **JOINED}, steps=2),
    Path("a range of scales", JOINED, steps=2, guidance=(1.5, 4.0)),
    Path("a teacher with its guidance within", JOINED, steps=2, within=True),
)


def times(turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """t one of the times i / 1000 of noise, low and high uniform within reach of it and of the ends."""
    t, reach = stock_time(turn.step.uniform("t")), turn.settings.reach
    down, up = t.clamp(max=reach), (1 - t).clamp(max=reach)
    return t, t - turn.step.uniform("low") * down, t + turn.step.uniform("high") * up


def apart(turn: Turn, z: Tensor, aim: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """weight d(z, aim), and its slope in z."""
    off, s = z - aim, turn.settings
    if s.loss == "squared":
        return weight * off.square().mean(), weight * 2 * off / off.numel()
    root = (off.square() + s.huber_c**2).sqrt()
    return weight * (root - s.huber_c).mean(), weight * off / root / off.numel()


def one(turn: Turn) -> Tensor:
    """z_1."""
    return turn.roles["student"].x0(turn.noise("start"), torch.ones(len(turn.text), dtype=torch.float64), turn.text)


def judged(turn: Turn, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x noised to low, or the first time of noise, that time, and the logits."""
    time = times(turn.before or turn)[1].clamp(min=0.001)
    noised = turn.noised(x, time, "judged noise")
    with torch.no_grad():
        return noised, time, turn.roles["discriminator"](noised, time, Condition(text=turn.text))


def known(turn: Turn) -> Known:
    return of_student(turn) if turn.trains == ("student",) else of_heads(turn)


def of_student(turn: Turn) -> Known:
    s, problem, student, target = turn.settings, turn.problem, turn.roles["student"], turn.roles["target"]
    t, low, high = times(turn)
    x_t = turn.noised(turn.x0, t)
    x0 = turn.roles["teacher"].x0(x_t, t, turn.guided(turn.scale))
    x_low, x_high = (stepped(problem, x0, x_t, t, to)[0] for to in (low, high))
    aim = torch.where((low >= s.anchor)[:, None], target.x0(x_low, low, turn.text), turn.x0)
    z = student.x0(x_t, t, turn.text)
    values: dict[str, Tensor | None] = {}
    values["consistency"], pull = apart(turn, z, aim, 1.0)
    joined = turn.step.index >= s.warmup_updates
    if joined:
        values["high"], more = apart(turn, z, target.x0(x_high, high, turn.text), s.high_weight)
        pull = pull + more
    slopes = student.slopes(pull, x_t, t, turn.text)
    z_1, e = one(turn), turn.noise("start")
    if joined:
        line = problem.schedule.alpha(t)[:, None] * z_1 + problem.schedule.sigma(t)[:, None] * e
        off = student.x0(line, t, turn.text) - z_1
        values["self"] = s.self_weight * off.square().mean()
        slopes = slopes + student.slopes(s.self_weight * 2 * off / off.numel(), line, t, turn.text)
    if s.gan_weight:
        x, time, logits = judged(turn, z_1)
        values["gan"] = s.gan_weight * softplus(-logits).mean()
        back = QuadraticHeads(turn.roles["discriminator"].numbers).back(-s.gan_weight * (-logits).sigmoid()
                                                                        / logits.numel(), x)
        slopes = slopes + student.slopes(problem.schedule.alpha(time)[:, None] * back, e, torch.ones_like(t), turn.text)
    return Known(values, {"student": slopes}, unchecked=("discriminator",))


def of_heads(turn: Turn) -> Known:
    value, slope = torch.zeros(()), 0
    for x, sign in ((turn.x0, 1), (one(turn.before), -1)):
        noised, time, logits = judged(turn, x)
        value = value + softplus(-sign * logits).mean()
        pull = -sign * (-sign * logits).sigmoid() / logits.numel()
        slope = slope + QuadraticHeads(turn.roles["discriminator"].numbers).slopes(pull, noised,
                                                                                   time[:, None], turn.text)
    return Known({"discriminator": value}, {"discriminator": slope})


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    heads = {"discriminator": QuadraticDiscriminator(QuadraticHeads.of(problem, problem.dim).numbers)}
    nets = {name: Net.of(problem) for name in ("teacher", "student", "target")}
    return nets | (heads if settings.gan_weight else {})


ALGORITHM = Algorithm(
    SCFlow,
    roles,
    orders=lambda settings: [Order(("student",)),
                             *([Order(("discriminator",), shares=1)] if settings.gan_weight else [])],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"),
                            "target": Follows("student", settings.target_decay),
                            **({"discriminator": Heads("teacher")} if settings.gan_weight else {})},
    known=known,
    defaults={"reach": 0.1, "anchor": 0.1, "loss": "huber", "huber_c": 0.01, "high_weight": 0.1, "self_weight": 0.1,
              "gan_weight": 0.1, "warmup_updates": 1000, "target_decay": 0.9},
    renoised=False,
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
