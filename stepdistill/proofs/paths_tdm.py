"""TDM by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..methods.base import Frozen, Trained
from ..methods.distribution.tdm import TDM
from .affine import Net
from .paths import Algorithm, Known, Order, Path, Turn, rows, stepped
from .problem import Check, Problem

STATE = {"critic_target": "state", "critic_steps": 2}
PATHS = (
    Path("the defaults", steps=4, elsewhere=True),
    Path("shapes/tdm, shapes-sd3/tdm", {"critic_target": "state"}, steps=4, moments=(0, 1), elsewhere=True),
    Path("toy/tdm, not guided", STATE, steps=4, guidance=1.0, elsewhere=True),
    Path("one segment", steps=1, moments=(0, 1)),
    Path("two segments", steps=2),
    Path("a range of guidance", steps=4, guidance=(1.5, 4.0)),
    Path("a teacher with its guidance within", steps=2, within=True),
    Path("critic_steps 3", {"critic_steps": 3}, steps=2),
    Path("the exact importance", {"temperature": 1.0}, steps=4),
    Path("temperature 5", {"temperature": 5.0}, steps=4),
    Path("levels up to 1", {"levels": "above"}, steps=4, moments=(0, 1)),
    Path("a random end", {"random_end": True}, steps=4, moments=(0, 1)),
    Path("a random end, levels up to 1, the law of the states",
         {"random_end": True, "levels": "above", "critic_target": "state"}, steps=2),
    Path("squared", {"loss": "squared"}, steps=4),
    Path("Huber, c = 0.3", {"huber_c": 0.3}, steps=4),
)


def states(turn: Turn) -> Tensor:
    """(steps, B, D): unit noise, and what DDIM of the student makes of it; all turns of a step have those of the
    first."""
    first, student, k = turn.before or turn, turn.roles["student"], turn.path.steps
    found = [first.noise("start")]
    for i in range(k - 1):
        t, r = (torch.full((len(turn.text),), 1 - n / k, dtype=torch.float64) for n in (i, i + 1))
        found.append(stepped(turn.problem, student.x0(found[-1], t, turn.text), found[-1], t, r)[0])
    return torch.stack(found)


def level(turn: Turn, s: Tensor, end: Tensor) -> Tensor:
    """i / 1000 between s + 0.01, or 0.02, and the segment's end, or 1, less 0.01, evenly."""
    end = end if turn.settings.levels == "segment" else torch.ones_like(end)
    first, last = torch.round(1000 * (s + 0.01).clamp(min=0.02)), torch.round(1000 * end - 10)
    return (first + (turn.step.uniform("t") * (last - first + 1)).floor()) / 1000


def known(turn: Turn) -> Known:
    s_, schedule, k = turn.settings, turn.problem.schedule, turn.path.steps
    exit = (k * turn.step.uniform("exit")).floor().long()
    given, end = states(turn)[exit, torch.arange(len(exit))], 1 - exit.double() / k
    s = end - 1 / k + (turn.step.uniform("s") * (1 / k - 0.02) if s_.random_end else 0.0)
    s = torch.where(s.abs() < 1e-12, 0.0, s)
    x0, t = turn.roles["student"].x0(given, end, turn.text), level(turn, s, end)
    x_s = stepped(turn.problem, x0, given, end, s)[0]
    alpha, sigma, alpha_s, sigma_s = (c(u)[:, None] for u in (t, s) for c in (schedule.alpha, schedule.sigma))
    kept = alpha / alpha_s
    fresh, eps = (sigma**2 - (kept * sigma_s) ** 2).sqrt(), turn.noise("noise")
    x_t = kept * x_s + fresh * eps
    fake = turn.roles["critic"].x0(x_t, t, turn.text)
    if turn.trains == ("critic",):
        weight = ((alpha / sigma) ** 2).clamp(max=5)
        if s_.critic_target == "x0":
            e = (x_t - alpha * x0) / sigma
            exponent = (eps**2 - e**2).sum(1, keepdim=True) / 2
            aim, weight = x0, weight * (exponent / (s_.temperature or eps.shape[1])).exp()
        else:                                                     # the score of x_t given x_s, put as an x_0
            aim, weight = (x_t - sigma**2 * eps / fresh) / alpha, weight * (fresh / sigma) ** 2
        off = fake - aim
        slopes = turn.roles["critic"].slopes(2 * weight * off / off.numel(), x_t, t, turn.text)
        return Known({"denoising": (weight * off**2).mean()}, {"critic": slopes})
    real = turn.roles["teacher"].x0(x_t, t, turn.guided(turn.scale))
    off, weight = fake - real, 1 / (x0 - real).abs().mean(1, keepdim=True)
    root = (off**2 + s_.huber_c**2).sqrt()
    apart, slope = (off**2, 2 * off) if s_.loss == "squared" else (root - s_.huber_c, off / root)
    slopes = turn.roles["student"].slopes(weight * slope / off.numel(), given, end, turn.text)
    return Known({"matching": (weight * apart).mean()}, {"student": slopes})


ALGORITHM = Algorithm(
    TDM,
    roles=lambda problem, settings: {name: Net.of(problem) for name in ("teacher", "student", "critic")},
    orders=lambda settings: [Order(("critic",), settings.critic_steps, settings.critic_steps),
                             Order(("student",), shares=1)],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")},
    known=known,
    defaults={"critic_steps": 1, "critic_target": "x0", "temperature": None, "levels": "segment", "random_end": False,
              "loss": "huber", "huber_c": 0.001},
    renoised=False,
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
