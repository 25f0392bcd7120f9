"""DisBack by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..methods.base import Follows, Frozen, Need, Trained
from ..methods.distribution.disback import DisBack
from .affine import Net
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, denoised, laws, noise_level, output_scale, rolled, rows
from .problem import Check, Problem

SHORT = {"records": 2, "record_every": 2, "interval": 3, "critic_steps": 2}     # student from 6; record 2, 1 from 9; 12
ALL = (0, 5, 6, 8, 9, 11, 12, 20)
SHAPES = {"records": 3, "record_every": 25, "interval": 75, "critic_steps": 2, "record_guidance": 1.0}
TOY = {"records": 3, "record_every": 20, "interval": 100, "critic_steps": 3, "t_range": (0.02, 0.7)}
PATHS = (
    Path("the defaults", moments=(0, 999, 1000, 1999, 2000, 9999, 10_000), elsewhere=True),
    Path("shapes/disback", SHAPES, moments=(99, 100, 175, 324, 325), elsewhere=True),
    Path("toy/disback, not guided", TOY, guidance=1.0, moments=(79, 80, 180, 379, 380), elsewhere=True),
    Path("a short path", SHORT, moments=ALL),
    Path("ten records", {"records": 10, "record_every": 1, "interval": 1, "critic_steps": 1}, moments=(11, 20, 21)),
    Path("a range of guidance", SHORT, guidance=(1.5, 4.0), moments=(6, 12)),
    Path("a record's own guidance", SHORT | {"record_guidance": 1.7}, guidance=(1.5, 4.0), moments=(6, 12)),
    Path("a teacher with its guidance within", SHORT | {"record_guidance": 1.0}, moments=(6, 12), within=True),
    *(Path(path.name, path.settings, moments=(6, 12)) for path in laws(**SHORT)),
    Path("t_range from 0.3 to 0.6", SHORT | {"t_range": (0.3, 0.6)}, moments=(6, 12)),
)


def known(turn: Turn) -> Known:
    s = turn.settings
    if turn.trains == ("critic",):
        sample, t = rolled(turn.before or turn), noise_level(turn, turn.step.uniform("t"), whole=True)
        value, slope = denoised(turn, sample.x, t, turn.text, output_scale(turn, t) ** 2)
        return Known({"denoising": value}, {"critic": slope})
    sample, t = rolled(turn), noise_level(turn, turn.step.uniform("t"))
    left = s.records - (turn.step.index - (s.records + 1) * s.record_every) // s.interval
    real, w = (f"record{left}", s.record_guidance or turn.scale) if left > 0 else ("teacher", turn.scale)
    x_t = turn.noised(sample.x, t)
    real = turn.roles[real].x0(x_t, t, turn.guided(w))
    pull = (turn.roles["critic"].x0(x_t, t, turn.text) - real) / (sample.x - real).abs().mean(1, keepdim=True)
    slopes = turn.roles["student"].slopes(pull / real.numel(), sample.given, sample.t, turn.text)
    return Known({"matching": None}, {"student": slopes})


def needs(settings: Any) -> dict[str, Need]:
    """Record i stands still once the critic has had i times record_every steps."""
    records = {f"record{i}": Follows("critic", 0.0, i * settings.record_every) for i in range(1, settings.records + 1)}
    return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher"), **records}


ALGORITHM = Algorithm(
    DisBack,
    roles=lambda problem, settings: {name: Net.of(problem) for name in needs(settings)},
    orders=lambda settings: [Order(("student",), since=(settings.records + 1) * settings.record_every),
                             Order(("critic",), settings.critic_steps, 1)],
    needs=needs,
    known=known,
    defaults={"records": 9, "record_every": 100, "interval": 1000, "record_guidance": None, "critic_steps": 5, **NOISE},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
