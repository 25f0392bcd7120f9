"""DP-DMD by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ..methods.base import Frozen, Trained
from ..methods.distribution.dp_dmd import DPDMD
from .affine import Net
from .paths import (
    Algorithm,
    Known,
    Order,
    Path,
    Turn,
    denoised,
    laws,
    noise_level,
    output_scale,
    rows,
    stepped,
)
from .problem import Check, Problem

ONE = {"critic_steps": 1}
PATHS = (
    Path("the defaults", steps=4, elsewhere=True),
    Path("shapes/dp_dmd, shapes-sd3/dp_dmd", {"critic_steps": 2}, steps=4, elsewhere=True),
    Path("toy/dp_dmd, not guided", {"nodes": 12, "anchor": 2, "critic_steps": 2, "noise_law": "mixture",
                                    "t_range": (0.02, 0.9), "shift": 1.0}, steps=4, guidance=1.0, elsewhere=True),
    Path("two steps", ONE, steps=2),
    Path("a range of guidance", ONE, steps=4, guidance=(1.5, 4.0), moments=(0, 1)),
    Path("a teacher with its guidance within", ONE, steps=2, within=True),
    Path("nodes 7", ONE | {"nodes": 7}, steps=2),
    Path("anchor 1", ONE | {"anchor": 1}, steps=2),
    Path("the teacher's whole way", ONE | {"nodes": 6, "anchor": 6}, steps=4),
    Path("diversity_weight 0.9", ONE | {"diversity_weight": 0.9}, steps=2),
    Path("shift 1.5", ONE | {"shift": 1.5}, steps=2),
    Path("uniform levels", ONE | {"noise_law": "uniform"}, steps=2),
    Path("t_range from 0.3 to 0.6", ONE | {"t_range": (0.3, 0.6)}, steps=2),
    *(Path(path.name, path.settings, steps=2) for path in laws(**ONE) if "start_time" not in path.settings),
)


def at(turn: Turn, t: float) -> Tensor:
    return torch.full((len(turn.text),), t, dtype=torch.float64)


def way(turn: Turn) -> list[tuple[Tensor, ...]]:
    """Of each of the student's DDIM steps from noise: its state, its time, its x_0, how much of that the landing holds,
    and of the state. The x_0 of the last is the sample."""
    x, found = turn.noise("start"), []
    k, schedule, student = turn.path.steps, turn.problem.schedule, turn.roles["student"]
    for i in range(k):
        t, r = at(turn, 1 - i / k), at(turn, max(0.0, 1 - (i + 1) / k))
        x0 = student.x0(x, t, turn.text)
        landed, share = stepped(turn.problem, x0, x, t, r)
        found.append((x, t, x0, share[:, None], (schedule.sigma(r) / schedule.sigma(t))[:, None]))
        x = landed
    return found


def first_guess(turn: Turn) -> Tensor:
    """The x_0 of one step from noise that arrives where `anchor` steps of the guided teacher do, of `nodes` that a
    shift moves towards noise."""
    s, x = turn.settings, turn.noise("start")
    even = [1 - i / s.nodes for i in range(s.anchor + 1)]
    times = [s.shift * u / (1 + (s.shift - 1) * u) for u in even]
    for t, r in pairwise(at(turn, t) for t in times):
        x, _ = stepped(turn.problem, turn.roles["teacher"].x0(x, t, turn.guided(turn.scale)), x, t, r)
    from_noise, share = stepped(turn.problem, torch.zeros_like(x), turn.noise("start"), at(turn, 1.0),
                                at(turn, times[-1]))
    return (x - from_noise) / share[:, None]


def known(turn: Turn) -> Known:
    steps = way(turn)
    x = steps[-1][2]
    if turn.trains == ("critic",):
        t = noise_level(turn, turn.step.uniform("t"), whole=True)
        value, slope = denoised(turn, x, t, turn.text, output_scale(turn, t) ** 2)
        return Known({"denoising": value}, {"critic": slope})
    student, t = turn.roles["student"], noise_level(turn, turn.step.uniform("t"))
    x_t = turn.noised(x, t)
    real = turn.roles["teacher"].x0(x_t, t, turn.guided(turn.scale))
    fake = turn.roles["critic"].x0(x_t, t, turn.text)
    given, told, said, *_ = steps[0]
    off, weight = said - first_guess(turn), turn.settings.diversity_weight
    slopes = student.slopes(2 * weight * off / off.numel(), given, told, turn.text)
    pull = (fake - real) / (x - real).abs().mean(1, keepdim=True) / x.numel()       # on what a step lands on
    for given, told, _, share, kept in reversed(steps[1:]):
        slopes = slopes + student.slopes(share * pull, given, told, turn.text)
        pull = kept * pull + student.back(share * pull, told)
    return Known({"matching": None, "diversity": weight * (off**2).mean()}, {"student": slopes})


ALGORITHM = Algorithm(
    DPDMD,
    roles=lambda problem, settings: {name: Net.of(problem) for name in ("teacher", "student", "critic")},
    orders=lambda settings: [Order(("critic",), settings.critic_steps), Order(("student",))],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")},
    known=known,
    defaults={"nodes": 30, "anchor": 5, "diversity_weight": 0.05, "critic_steps": 5, "noise_law": "shifted",
              "t_range": (0.0, 1.0), "mean": -1.2, "std": 1.2, "shift": 3.0},
    renoised=False,
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
