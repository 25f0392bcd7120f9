"""Diff-Instruct by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator

from ..methods.base import Frozen, Trained
from ..methods.distribution.diff_instruct import DiffInstruct
from .affine import Net
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, denoised, noise_level, rolled, rows
from .problem import Check, Problem

PATHS = (
    Path("the defaults, shapes/diff_instruct", elsewhere=True),
    Path("toy/diff_instruct, not guided", guidance=1.0, elsewhere=True),
    Path("a range of guidance", guidance=(1.5, 4.0)),
    Path("begun at 0.375", {"start_time": 0.375}, elsewhere=True),
    Path("mean 0.4", {"mean": 0.4}),
    Path("std 0.6", {"std": 0.6}),
    Path("sigma_data 0.5", {"sigma_data": 0.5}),
    Path("uniform levels", {"noise_law": "uniform"}),
    Path("uniform levels from 0.3 to 0.6", {"noise_law": "uniform", "t_range": (0.3, 0.6)}),
    Path("shifted levels", {"noise_law": "shifted", "shift": 2.0}),
    Path("a mixture of levels", {"noise_law": "mixture"}),
)


def known(turn: Turn) -> Known:
    sample, t, schedule = rolled(turn), noise_level(turn, turn.step.uniform("t")), turn.problem.schedule
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
    defaults=NOISE | {"noise_law": "lognormal", "t_range": (0.0, 1.0), "sigma_data": 1.0},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
