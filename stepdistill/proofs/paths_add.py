"""ADD by hand, on each path of its settings: through a curved decoder, curved features and quadratic heads."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.adversarial.add import ADD
from ..methods.base import Codec, Features, Frozen, Heads, Trained
from .affine import Net, QuadraticHeads
from .paths import Algorithm, Known, Order, Path, Turn, rows, stock_time
from .problem import Check, Problem

TOY = {"nodes": 1, "distillation_weight": 0.2, "noise": 1.0}
PIXELS, MAPS = 5, (3, 2)                # numbers of a picture, and of each feature map
TOKENS = (2, 3)                         # positions of each map that have a logit
PATHS = (
    Path("the defaults, shapes/add", steps=4, moments=(0, 1), elsewhere=True),
    Path("toy/add, under noise, not guided", TOY, guidance=1.0, elsewhere=True),
    Path("a range of guidance", guidance=(1.5, 4.0)),
    Path("two nodes", {"nodes": 2}, steps=2),
    Path("distillation_weight 0", {"distillation_weight": 0.0}),
    Path("distillation_weight 0.7", {"distillation_weight": 0.7}),
    Path("distance in latents", {"distance": "latents"}, elsewhere=True),
    Path("distance in latents, under noise, a range of guidance", {"distance": "latents", "noise": 0.5},
         guidance=(1.5, 4.0)),
    Path("r1_weight 0", {"r1_weight": 0.0}),
    Path("r1_weight 0.3", {"r1_weight": 0.3}),
    Path("r1_weight 0.3, under noise", {"r1_weight": 0.3, "noise": 0.5}),
    Path("noise 0.5", {"noise": 0.5}, steps=4),
    Path("critic_steps 3, all on one sample", {"critic_steps": 3, "noise": 0.5}),
)


@dataclass
class Curved:
    """f(x) = A x + (B x)^2 of a sample's numbers. Of samples (B, 1, D, 1) it makes such, of rows (B, D) rows."""

    A: Tensor
    B: Tensor

    @classmethod
    def of(cls, problem: Problem, given: int, made: int) -> Curved:
        return cls(0.7 * problem.normal(made, given), 0.4 * problem.normal(made, given))

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        found = flat @ self.A.T + (flat @ self.B.T) ** 2
        return found if x.ndim == 2 else found[:, None, :, None]

    def back(self, pull: Tensor, x: Tensor) -> Tensor:
        """The slope in x that `pull`, a slope in f, makes."""
        return pull @ self.A + (2 * pull * (x @ self.B.T)) @ self.B


@dataclass
class MapHeads:
    """Quadratic logits of each map, one for each of its positions, told the prompt."""

    heads: list[QuadraticHeads]
    numbers: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = {f"{i} {name}": value for i, head in enumerate(self.heads)
                        for name, value in head.numbers.items()}

    def __call__(self, maps: list[Tensor], cond: Condition) -> list[Tensor]:
        none = torch.zeros(len(cond.text), 1, dtype=torch.float64)
        return [head(m.flatten(1), none, cond) for head, m in zip(self.heads, maps)]

    def slopes(self, pulls: list[Tensor], maps: list[Tensor], text: Tensor) -> Tensor:
        none = torch.zeros(len(text), 1, dtype=torch.float64)
        return torch.cat([head.slopes(each, m, none, text) for each, head, m in zip(pulls, self.heads, maps)])

    def r1(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(B,) the squared slopes of the logits' mean in each map, and the flat gradient of their mean."""
        total, flat = torch.zeros(len(maps[0]), dtype=torch.float64), []
        for head, m in zip(self.heads, maps):
            count = len(head.numbers["o"])
            # of the mean over positions: the mean Q + Q', applied to m, and the mean u
            slope = head.back(torch.full((len(m), count), 1 / count, dtype=torch.float64), m)
            total = total + slope.square().sum(1)
            of_Q = 2 * (slope.T @ m + m.T @ slope) / len(m) / count
            others = torch.zeros(sum(head.numbers[name].numel() for name in "ceo"), dtype=torch.float64)
            flat += [of_Q.repeat(count, 1, 1).flatten(), (2 * slope.mean(0) / count).repeat(count), others]
        return total, torch.cat(flat)


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    first, second = (Curved.of(problem, PIXELS, size) for size in MAPS)
    heads = MapHeads([QuadraticHeads.of(problem, size, count=count) for size, count in zip(MAPS, TOKENS)])
    return {"teacher": Net.of(problem), "student": Net.of(problem), "decode": Curved.of(problem, problem.dim, PIXELS),
            "features": Features2(first, second), "discriminator": heads}


@dataclass
class Features2:
    """Two maps of a picture."""

    first: Curved
    second: Curved

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        return [self.first(pixels), self.second(pixels)]

    def back(self, pulls: list[Tensor], pixels: Tensor) -> Tensor:
        return self.first.back(pulls[0], pixels) + self.second.back(pulls[1], pixels)


def sample(turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """The student's x_0, what it is given, and the time."""
    schedule, noise, count = turn.problem.schedule, turn.noise("start"), turn.settings.nodes
    s = ((turn.step.uniform("s") * count).floor() + 1) / count
    x_s = schedule.alpha(s)[:, None] * turn.x0 + schedule.sigma(s)[:, None] * noise
    x_s = torch.where(s[:, None] == 1, noise, x_s)                # pure, whatever alpha is there
    return turn.roles["student"].x0(x_s, s, turn.text), x_s, s


def shown(turn: Turn, pixels: Tensor, name: str) -> Tensor:
    """The picture under noise of a deviation of its own, uniform from 0."""
    deviation = turn.settings.noise * turn.step.uniform(f"deviation of {name}")
    return pixels + deviation[:, None] * turn.step.normal(f"noise on {name}", (PIXELS,))


def known(turn: Turn) -> Known:
    return of_student(turn) if turn.trains == ("student",) else of_heads(turn)


@torch.no_grad()
def of_student(turn: Turn) -> Known:
    s, (x, x_s, t), (decode, features, heads) = turn.settings, sample(turn), players(turn)
    seen = shown(turn, decode(x), "fake")
    maps = features(seen)
    ones = [torch.full((len(x), count), -1 / len(x) / count, dtype=torch.float64) for count in TOKENS]
    pull = decode.back(features.back([head.back(one, m) for head, m, one in zip(heads.heads, maps, ones)], seen), x)
    values = {"gan": -sum(logits.mean() for logits in heads(maps, turn.batch.cond))}
    if s.distillation_weight:
        level = stock_time(turn.step.uniform("t"))
        alpha = turn.problem.schedule.alpha(level)
        x_t = turn.noised(x, level)
        aim = turn.roles["teacher"].x0(x_t, level, turn.guided(turn.scale))
        off = x - aim if s.distance == "latents" else decode(x) - decode(aim)
        values["distillation"] = s.distillation_weight * (alpha * off.square().mean(1)).mean()
        pulled = 2 * s.distillation_weight * alpha[:, None] * off / off.numel()
        pull = pull + (pulled if s.distance == "latents" else decode.back(pulled, x))
    return Known(values, {"student": turn.roles["student"].slopes(pull, x_s, t, turn.text)},
                 unchecked=("discriminator",))


@torch.no_grad()
def of_heads(turn: Turn) -> Known:
    s, (decode, features, heads) = turn.settings, players(turn)
    values, slope = {"discriminator": torch.zeros(())}, 0
    for latents, name, sign in ((turn.x0, "real", 1), (sample(turn.before)[0], "fake", -1)):
        maps = features(shown(turn, decode(latents), name))
        shorts = [1 - sign * logits for logits in heads(maps, turn.batch.cond)]           # of the margin
        values["discriminator"] = values["discriminator"] + sum(short.clamp(min=0).mean() for short in shorts)
        slope = slope + heads.slopes([-sign * (short > 0).double() / short.numel() for short in shorts],
                                     maps, turn.text)
        if name == "real" and s.r1_weight:
            penalty, of_penalty = heads.r1(maps)
            values["r1"], slope = s.r1_weight * penalty.mean(), slope + s.r1_weight * of_penalty
    return Known(values, {"discriminator": slope})


def players(turn: Turn) -> tuple[Curved, Features2, MapHeads]:
    return turn.roles["decode"], turn.roles["features"], turn.roles["discriminator"]


ALGORITHM = Algorithm(
    ADD,
    roles,
    orders=lambda settings: [Order(("student",)),
                             Order(("discriminator",), settings.critic_steps, shares=settings.critic_steps)],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"), "decode": Codec(),
                            "features": Features(), "discriminator": Heads("features", kind="tokens")},
    known=known,
    defaults={"nodes": 4, "distillation_weight": 2.5, "distance": "pixels", "r1_weight": 1e-5, "noise": 0.0,
              "critic_steps": 1},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
