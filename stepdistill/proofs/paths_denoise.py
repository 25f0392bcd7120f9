"""Denoising by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator

from ..methods.base import Trained
from ..methods.trajectory.denoise import Denoise
from .affine import Net
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, noise_level, output_scale, rows
from .problem import Check, Problem

PATHS = (
    Path("the defaults, shapes/denoise", steps=25, guidance=1.0, moments=(0, 1), elsewhere=True),
    Path("toy/denoise, 32 steps on a flow, 40 else", steps=40, guidance=1.0, elsewhere=True),
    Path("t_range from 0.3 to 0.6", {"t_range": (0.3, 0.6)}, steps=20, guidance=1.0),
    Path("log-normal levels", {"noise_law": "lognormal"}, steps=20, guidance=1.0),
    Path("log-normal levels, mean 0.4", {"noise_law": "lognormal", "mean": 0.4}, steps=20, guidance=1.0),
    Path("log-normal levels, std 0.6", {"noise_law": "lognormal", "std": 0.6}, steps=20, guidance=1.0),
    Path("shifted levels", {"noise_law": "shifted"}, steps=20, guidance=1.0),
    Path("shifted levels, shift 2", {"noise_law": "shifted", "shift": 2.0}, steps=20, guidance=1.0),
    Path("a mixture of levels", {"noise_law": "mixture"}, steps=20, guidance=1.0),
)


def known(turn: Turn) -> Known:
    """The mean squared error of what the network says: output_scale times that of its x_0."""
    student, t = turn.roles["student"], noise_level(turn, turn.step.uniform("t"))
    x_t, weight = turn.noised(turn.x0, t), output_scale(turn, t) ** 2
    off = student.x0(x_t, t, turn.text) - turn.x0
    pull = 2 * weight[:, None] * off / off.numel()
    return Known({"denoising": (weight * off.square().mean(1)).mean()},
                 {"student": student.slopes(pull, x_t, t, turn.text)})


ALGORITHM = Algorithm(
    Denoise,
    roles=lambda problem, settings: {"student": Net.of(problem)},
    orders=lambda settings: [Order(("student",))],
    needs=lambda settings: {"student": Trained("teacher")},
    known=known,
    defaults={**{name: value for name, value in NOISE.items() if name != "start_time"}, "t_range": (0.0, 1.0)},
    renoised=False,
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
