"""SCott by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.base import Follows, Frozen, Heads, Trained
from ..methods.consistency.scott import SCott
from .affine import Net, QuadraticHeads, TokenDiscriminator, mean_of_tokens, token_shares
from .path_table import PUBLISHED
from .paths import Algorithm, Known, Order, Path, Turn, rows
from .problem import Check, Problem

SMALL = {"nodes": 20, "skip": 1, "gan_weight": 0.0}
RANGE = (1.5, 4.0)
PATHS = (
    Path("the defaults", steps=4, elsewhere=True),
    Path("shapes/scott", {"nodes": 20, "skip": 1, "substeps": 2, "gan_weight": 0.05}, steps=4, elsewhere=True),
    Path("toy/scott", {"nodes": 50, "skip": 1, "substeps": 2, "gan_weight": 0.001}, steps=2, guidance=1.0,
         elsewhere=True),
    Path("one sub-step over 3 nodes", SMALL | {"skip": 3, "substeps": 1}, steps=4),
    Path("7 sub-steps", SMALL | {"substeps": 7}, steps=2),
    Path("a step to the data", {"nodes": 4, "skip": 4, "gan_weight": 0.0}, steps=2),
    Path("eta 0", SMALL | {"eta": 0.0}, steps=2),
    Path("eta 1", SMALL | {"eta": 1.0}, steps=2, elsewhere=True),
    Path("Huber", SMALL | {"loss": "huber"}, steps=2),
    Path("Huber, c = 0.3", SMALL | {"loss": "huber", "huber_c": 0.3}, steps=2),
    Path("gan_weight 2", SMALL | {"gan_weight": 2.0}, steps=2),
    Path("a range of scales", SMALL, steps=2, guidance=RANGE),
    Path("guidance embedding, a range of scales", SMALL | {"guidance_embedding": True, "gan_weight": 0.4}, steps=2,
         guidance=RANGE),
    Path("a teacher with its guidance within", SMALL, steps=2, within=True),
)


def bridged(turn: Turn, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Down even sub-steps: alpha_r x_0 + (sigma_r^2 - f^2)^(1/2) eps + f z, f = eta sigma_r / sigma_t (sigma_t^2 -
    (alpha_t sigma_r / alpha_r)^2)^(1/2)."""
    schedule, h, text = turn.problem.schedule, turn.settings.substeps, turn.guided(turn.scale)
    for i in range(h):
        here, there = (t + (s - t) * j / h for j in (i, i + 1))
        (a, g), (a_r, g_r) = ((schedule.alpha(u)[:, None], schedule.sigma(u)[:, None]) for u in (here, there))
        x0 = turn.roles["teacher"].x0(x, here, text)
        fresh = turn.settings.eta * g_r / g * (g**2 - (a * g_r / a_r) ** 2).sqrt()
        x = a_r * x0 + (g_r**2 - fresh**2).sqrt() * (x - a * x0) / g + fresh * turn.noise(f"fresh {i}")
    return x


def boundary(turn: Turn, t: Tensor) -> tuple[Tensor, Tensor]:
    """LCMScheduler's, (B, 1); a flow has none above the data."""
    if turn.problem.name == "flow":
        return torch.zeros_like(t)[:, None], torch.ones_like(t)[:, None]
    scaled = 10 * (1000 * t[:, None] - 1)
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


def told(turn: Turn) -> Tensor | None:
    """The scale that the student reads."""
    if not turn.settings.guidance_embedding:
        return None
    return torch.as_tensor(turn.scale, dtype=torch.float32).expand(len(turn.text)).double()


def judged(turn: Turn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's f, the target's, x_t and t."""
    n, student, target = turn.settings.nodes, turn.roles["student"], turn.roles["target"]
    i = 1 + (turn.step.uniform("node") * n).floor()
    t, s = i / n, (i - turn.settings.skip).clamp(min=0) / n
    x_t = turn.noised(turn.x0, t)
    x_s = bridged(turn, x_t, t, s)
    later = torch.where(s > 0, s, t)
    (skip, out), (skip_s, out_s) = boundary(turn, t), boundary(turn, later)
    aim = torch.where((s > 0)[:, None], skip_s * x_s + out_s * target.x0(x_s, later, turn.text, told(turn)), x_s)
    return skip * x_t + out * student.x0(x_t, t, turn.text, told(turn)), aim, x_t, t


def logits(turn: Turn, x: Tensor, t: Tensor) -> Tensor:
    """Of all positions."""
    with torch.no_grad():
        return torch.cat(turn.roles["discriminator"](x, t, Condition(text=turn.text)), 1)


def known(turn: Turn) -> Known:
    s = turn.settings
    if turn.trains != ("student",):
        return of_heads(turn)
    x, aim, x_t, t = judged(turn)
    off = x - aim
    root = (off.square() + s.huber_c**2).sqrt()
    value = off.square().mean() if s.loss == "squared" else (root - s.huber_c).mean()
    pull, values = (2 * off if s.loss == "squared" else off / root) / off.numel(), {"consistency": value}
    if s.gan_weight:
        found = logits(turn, x, t)
        values["gan"] = -s.gan_weight * mean_of_tokens(found)
        heads = QuadraticHeads(turn.roles["discriminator"].numbers)
        pull = pull + heads.back(-s.gan_weight * token_shares(len(x)).expand_as(found), x)
    slopes = turn.roles["student"].slopes(boundary(turn, t)[1] * pull, x_t, t, turn.text, told(turn))
    return Known(values, {"student": slopes}, unchecked=("critic", "discriminator"))


def of_heads(turn: Turn) -> Known:
    """Hinges of the data and of the student's x_0, as they are, told the student's time."""
    x, _, _, t = judged(turn.before)
    value, slope = torch.zeros(()), 0
    for judged_x, sign in ((turn.x0, 1), (x, -1)):
        found = logits(turn, judged_x, t)
        short = 1 - sign * found
        value = value + mean_of_tokens(short.clamp(min=0))
        slope = slope + QuadraticHeads(turn.roles["discriminator"].numbers).slopes(
            -sign * (short > 0).double() * token_shares(len(x)), judged_x, t[:, None], turn.text)
    return Known({"discriminator": value}, {"discriminator": slope}, unchecked=("critic",))


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    found = {name: Net.of(problem) for name in ("teacher", "student", "target")}
    if not settings.gan_weight:
        return found
    return found | {"critic": Net.of(problem), "discriminator": TokenDiscriminator.of(problem)}


def needs(settings: Any) -> dict[str, Any]:
    found = {"teacher": Frozen(), "student": Trained("teacher", ("w",) if settings.guidance_embedding else ()),
             "target": Follows("student", settings.target_decay)}
    game = {"critic": Trained("teacher"), "discriminator": Heads("critic", kind="tokens")}
    return found | (game if settings.gan_weight else {})


ALGORITHM = Algorithm(
    SCott,
    roles,
    orders=lambda settings: [Order(("student",)),
                             *([Order(("critic", "discriminator"), shares=1)] if settings.gan_weight else [])],
    needs=needs,
    known=known,
    defaults=PUBLISHED["scott"],
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
