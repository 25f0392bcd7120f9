"""SwiftBrush by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ..methods.base import Frozen, Trained
from ..methods.distribution.swiftbrush import SwiftBrush
from .affine import Net
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, denoised, laws, noise_level, rolled, rows
from .problem import Check, Problem

PATHS = (
    Path("the defaults, shapes/swiftbrush", moments=(0, 1, 2), elsewhere=True),       # so that some prompts are dropped
    Path("toy/swiftbrush, drop 0, not guided", {"drop": 0.0, "t_range": (0.02, 0.6)}, guidance=1.0, elsewhere=True),
    Path("a range of guidance", guidance=(1.5, 4.0)),
    Path("drop 0.5", {"drop": 0.5}),
    Path("drop 0, guided", {"drop": 0.0}),
    Path("t_range from 0.3 to 0.6", {"t_range": (0.3, 0.6)}),
    Path("t_range to 1", {"t_range": (0.0, 1.0)}),
    *laws(),
)


def known(turn: Turn) -> Known:
    schedule = turn.problem.schedule
    if turn.trains == ("critic",):                                # of the student's own sample, at all times, in eps
        sample, t = rolled(turn.before), noise_level(turn, turn.step.uniform("t"), whole=True)
        dropped = turn.step.uniform("drop") < turn.settings.drop
        text = torch.where(dropped[:, None], turn.null, turn.text)
        value, slope = denoised(turn, sample.x, t, text, schedule.alpha(t) ** 4 / schedule.sigma(t) ** 2)
        return Known({"denoising": value}, {"critic": slope})
    sample, t = rolled(turn), noise_level(turn, turn.step.uniform("t"))
    x_t, text = turn.noised(sample.x, t), turn.guided(turn.scale)
    apart = turn.roles["critic"].x0(x_t, t, text) - turn.roles["teacher"].x0(x_t, t, text)
    pull = (schedule.alpha(t) * schedule.sigma(t))[:, None] * apart / apart.numel()
    return Known({"matching": None}, {"student": turn.roles["student"].slopes(pull, sample.given, sample.t, turn.text)})


ALGORITHM = Algorithm(
    SwiftBrush,
    roles=lambda problem, settings: {name: Net.of(problem) for name in ("teacher", "student", "critic")},
    orders=lambda settings: [Order(("student",)), Order(("critic",), shares=1)],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")},
    known=known,
    defaults={**NOISE, "drop": 0.1},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
