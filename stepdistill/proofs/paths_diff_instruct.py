"""Diff-Instruct by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..methods.base import Frozen, Trained
from ..methods.distribution.diff_instruct import DiffInstruct
from .affine import Net
from .paths import Algorithm, Known, Order, Path, Turn, denoised, rolled, rows
from .problem import Check, Problem

PATHS = (
    Path("the defaults, shapes/diff_instruct", elsewhere=True),
    Path("toy/diff_instruct, not guided", guidance=1.0, elsewhere=True),
    Path("a range of guidance", guidance=(1.5, 4.0)),
    Path("mean 0.4", {"mean": 0.4}),
    Path("std 0.6", {"std": 0.6}),
    Path("sigma_data 0.5", {"sigma_data": 0.5}),
)


def level(turn: Turn) -> Tensor:
    """t where ln(sigma / alpha) is the normal quantile of its draw."""
    ratio = (turn.settings.mean + turn.settings.std * torch.special.ndtri(turn.step.uniform("t"))).exp()
    return turn.problem.schedule.time_at(ratio.atan())


def known(turn: Turn) -> Known:
    sample, t, schedule = rolled(turn), level(turn), turn.problem.schedule
    if turn.trains == ("critic",):
        weight = (schedule.alpha(t) / schedule.sigma(t)) ** 2 + turn.settings.sigma_data**-2
        value, slope = denoised(turn, sample.x, t, turn.text, weight)
        return Known({"denoising": value}, {"critic": slope})
    x_t = turn.noised(sample.x, t)
    real = turn.roles["teacher"].x0(x_t, t, turn.guided(turn.scale))
    pull = (turn.roles["critic"].x0(x_t, t, turn.text) - real) / real.numel()
    return Known({"matching": None}, {"student": turn.roles["student"].slopes(pull, sample.given, sample.t, turn.text)})


ALGORITHM = Algorithm(
    DiffInstruct,
    roles=lambda problem, settings: {name: Net.of(problem) for name in ("teacher", "student", "critic")},
    orders=lambda settings: [Order(("critic",)), Order(("student",))],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")},
    known=known,
    defaults={"mean": -1.2, "std": 1.2, "sigma_data": 1.0},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
