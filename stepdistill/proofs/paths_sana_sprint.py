"""SANA-Sprint by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.base import Frozen, Heads, Trained
from ..methods.hybrid.sana_sprint import SanaSprint
from .affine import Net, QuadraticHeads, TokenDiscriminator, mean_of_tokens, token_shares
from .hand import Hand
from .paths import Algorithm, Known, Order, Path, Turn, rows
from .problem import Check, Problem
from .tangents import FEW, angles, consistency, latest, noised, sampled, seen

RANGE = (1.5, 4.0)
PATHS = (
    Path("the defaults, in the warm-up and after", moments=(0, 4, 20), elsewhere=True),
    Path("a range of scales, which the student reads", steps=2, guidance=RANGE, moments=(20,), elsewhere=True),
    Path("a range of scales, whose mean its weights hold", {"guidance_embedding": False}, steps=2, guidance=RANGE,
         moments=(20,), elsewhere=True),
    Path("shapes/sana_sprint", {"mean": -0.1, "damping": 1.0, "derivative": "difference", "width": 0.05,
                                "gan_weight": 0.1}, steps=2, guidance=RANGE, moments=(20,), elsewhere=True),
    Path("toy/sana_sprint", {"mean": -0.1, "damping": 10.0, "derivative": "difference", "width": 0.05,
                             "gan_weight": 0.002, "judged_mean": -1.0, "guidance_embedding": False}, steps=4,
         guidance=1.0, moments=(4, 20), elsewhere=True),
    *FEW,
    Path("gan_weight 2", {"gan_weight": 2.0}, moments=(20,)),
    Path("pure noise alone", {"noise_share": 1.0}, steps=4, moments=(20,)),
    Path("no pure noise", {"noise_share": 0.0}, moments=(20,)),
    Path("levels of the heads", {"judged_mean": -1.5, "judged_std": 0.4}, moments=(20,)),
    Path("a teacher with its guidance within", moments=(20,), within=True),
)


def told(turn: Turn) -> Tensor | None:
    """The scale that the student reads, be the teacher guided at it or within."""
    w = torch.as_tensor(turn.problem.w if turn.path.within else turn.scale, dtype=torch.float64).expand(len(turn.text))
    return w if turn.settings.guidance_embedding else None


def sample(turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """The student's x_0, what it is given, and the time: unit noise as a state of TrigFlow, or data noised to a
    draw."""
    problem, hand = turn.problem, Hand(turn.problem)
    begins = hand.angle(torch.tensor([latest(problem)], dtype=torch.float64))
    pure, theta = turn.step.uniform("pure") < turn.settings.noise_share, angles(turn, turn.step.uniform("judged t"))
    x = torch.where(pure[:, None], turn.noise("start"), noised(turn, turn.x0, theta, "start"))
    own = seen(problem, x, torch.where(pure, begins, theta))
    return turn.roles["student"].x0(own.x, own.t, turn.text, told(turn)), own.x, own.t


def judged(turn: Turn, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """x noised, its level, and the heads' logits."""
    s = turn.settings
    log_ratio = s.judged_mean + s.judged_std * torch.special.ndtri(turn.step.uniform(f"{name} s"))
    level = turn.problem.schedule.time_at(log_ratio.exp().atan())
    x_s = turn.noised(x, level, f"{name} noise")
    with torch.no_grad():
        return x_s, level, torch.cat(turn.roles["discriminator"](x_s, level, Condition(text=turn.text)), 1)


def known(turn: Turn) -> Known:
    heads = QuadraticHeads(turn.roles["discriminator"].numbers)
    if turn.trains == ("student",):
        weight, (value, slope), (x, given, t) = turn.settings.gan_weight, consistency(turn, told(turn)), sample(turn)
        x_s, s, logits = judged(turn, x, "fake")
        pull = -weight * token_shares(len(x)).expand_as(logits)
        pull = heads.back(pull, x_s) * turn.problem.schedule.alpha(s)[:, None]
        slope = slope + turn.roles["student"].slopes(pull, given, t, turn.text, told(turn))
        return Known({"consistency": value, "gan": -weight * mean_of_tokens(logits)}, {"student": slope},
                     unchecked=("discriminator",))
    value, slope = torch.zeros(()), 0
    student = replace(turn, step=turn.before.step)
    for x, name, sign in ((turn.x0, "real", 1), (sample(student)[0], "fake", -1)):
        x_s, s, logits = judged(turn, x, name)
        short = 1 - sign * logits                                 # of the margin
        value = value + mean_of_tokens(torch.where(short > 0, short, 0))
        slope = slope + heads.slopes(-sign * (short > 0).double() * token_shares(len(x)), x_s, s[:, None], turn.text)
    return Known({"discriminator": value}, {"discriminator": slope})


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    return {"teacher": Net.of(problem), "student": Net.of(problem), "discriminator": TokenDiscriminator.of(problem)}


def needs(settings: Any) -> dict[str, Any]:
    student = Trained("teacher", ("w",) if settings.guidance_embedding else ())
    return {"teacher": Frozen(), "student": student, "discriminator": Heads("teacher", kind="tokens")}


ALGORITHM = Algorithm(
    SanaSprint,
    roles,
    orders=lambda settings: [Order(("student",)), Order(("discriminator",), shares=1)],
    needs=needs,
    known=known,
    defaults={"mean": 0.9, "std": 1.6, "damping": 0.1, "gan_weight": 0.5, "noise_share": 0.5, "judged_mean": 0.1,
              "judged_std": 1.0, "guidance_embedding": True},
    times=sampled,
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
