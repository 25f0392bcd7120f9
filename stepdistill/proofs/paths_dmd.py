"""DMD by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator

from ..methods.base import Frozen, Trained
from ..methods.distribution.dmd import DMD
from .affine import Net
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, denoised, laws, noise_level, output_scale, rolled, rows
from .problem import Check, Problem

ENDS = (0, 60, 99)                      # moments, hundredths of the training
PATHS = (
    Path("the defaults, shapes/dmd", moments=ENDS, elsewhere=True),
    Path("toy/dmd, regression_weight 1, not guided", {"regression_weight": 1.0}, guidance=1.0, moments=ENDS,
         elsewhere=True),
    Path("regression_end 0.5", {"regression_end": 0.5}, moments=(0, 20, 50, 90)),
    Path("pairs to the end", {"regression_end": None}, moments=ENDS),
    Path("a range of guidance", guidance=(1.5, 4.0)),
    Path("regression_weight 0, scores alone", {"regression_weight": 0.0}),
    Path("t_range from 0.3 to 0.6", {"t_range": (0.3, 0.6)}),
    Path("t_range to 1", {"t_range": (0.0, 1.0)}),
    *laws(),
)


def known(turn: Turn) -> Known:
    if turn.trains == ("critic",):                                # of the student's own sample, at all times
        sample, t = rolled(turn.before), noise_level(turn, turn.step.uniform("t"), whole=True)
        value, slope = denoised(turn, sample.x, t, turn.text, output_scale(turn, t) ** 2)
        return Known({"denoising": value}, {"critic": slope})
    sample, t, student = rolled(turn), noise_level(turn, turn.step.uniform("t")), turn.roles["student"]
    x_t = turn.noised(sample.x, t)
    real, fake = turn.roles["teacher"].x0(x_t, t, turn.guided(turn.scale)), turn.roles["critic"].x0(x_t, t, turn.text)
    pull = (fake - real) / (sample.x - real).abs().mean(1, keepdim=True) / real.numel()
    s, (noise, end) = turn.settings, turn.pair
    kept = 1.0 if s.regression_end is None else 1 - min(turn.step.progress / s.regression_end, 1)
    weight = s.regression_weight * kept
    off = student.x0(noise, sample.t, turn.text) - end
    slope = student.slopes(pull, sample.given, sample.t, turn.text)
    return Known({"matching": None, "regression": weight * off.square().mean()},
                 {"student": slope + student.slopes(2 * weight * off / off.numel(), noise, sample.t, turn.text)})


ALGORITHM = Algorithm(
    DMD,
    roles=lambda problem, settings: {name: Net.of(problem) for name in ("teacher", "student", "critic")},
    orders=lambda settings: [Order(("student",)), Order(("critic",), shares=1)],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")},
    known=known,
    defaults=NOISE | {"regression_weight": 0.25, "regression_end": 1.0},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
