"""rCM by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Frozen, Trained
from ..methods.hybrid.rcm import RCM
from .affine import Net
from .hand import Hand
from .paths import Algorithm, Known, Order, Path, Turn, rows
from .problem import Check, Problem
from .tangents import FEW, Seen, clean, consistency, latest, noised, sampled, seen

RANGE = (1.5, 4.0)
AFTER = (20, 21, 22, 23)                # moments after the warm-up, so that rollouts differ
PATHS = (
    Path("the defaults, in the warm-up and after", moments=(0, 4, 9, *AFTER), elsewhere=True),
    Path("the defaults at 4 steps, a range of scales", {"critic_steps": 1}, steps=4, guidance=RANGE, moments=AFTER),
    Path("shapes/rcm, shapes-sd3/rcm", {"mean": -0.1, "damping": 1.0, "derivative": "difference", "width": 0.05,
                                        "critic_steps": 2}, steps=2, moments=AFTER, elsewhere=True),
    Path("toy/rcm", {"mean": -0.1, "damping": 10.0, "derivative": "difference", "width": 0.05, "critic_steps": 1,
                     "shift": 1.0}, steps=4, guidance=1.0, moments=(4, *AFTER), elsewhere=True),
    *(replace(path, settings=path.settings | {"critic_steps": 1}) for path in FEW),
    Path("matching_weight 3", {"matching_weight": 3.0, "critic_steps": 1}, moments=AFTER[:1]),
    Path("critic_steps 2", {"critic_steps": 2}, moments=AFTER[:1]),
    Path("rollouts of one step", {"rollout_steps": 1, "critic_steps": 1}, moments=AFTER),
    Path("rollouts of up to seven steps", {"rollout_steps": 7, "critic_steps": 1}, moments=AFTER, elsewhere=True),
    Path("shift 2", {"shift": 2.0, "critic_steps": 1}, moments=AFTER),
    Path("a teacher with its guidance within", {"critic_steps": 1}, moments=AFTER[:1], within=True),
)


def begins(problem: Problem) -> Tensor:
    """The angle where sampling starts, (1,)."""
    return Hand(problem).angle(torch.tensor([latest(problem)], dtype=torch.float64))


def level(turn: Turn, name: str) -> Tensor:
    """Angles (B,): a flow's sigma is uniform, moved towards noise, within what the networks know."""
    problem, shift, u = turn.problem, turn.settings.shift, turn.step.uniform(name)
    sigma = shift * u / (1 + (shift - 1) * u)
    first = Hand(problem).angle(torch.tensor([1 / 1000], dtype=torch.float64))
    return torch.atan2(sigma, 1 - sigma).clamp(first.item(), begins(problem).item())


def rolled(turn: Turn) -> tuple[Tensor, Seen]:
    """The student's x_0 after its rollout, and what its last evaluation is given."""
    problem, student, theta = turn.problem, turn.roles["student"], begins(turn.problem).expand(len(turn.text))
    x = turn.noise("start")
    for i in range(int(turn.step.shared("steps") * turn.settings.rollout_steps)):
        x0 = clean(problem, student, x, theta, turn.text)
        theta = torch.minimum(theta, level(turn, f"rollout t {i}"))
        x = noised(turn, x0, theta, f"renoise {i}")
    own = seen(problem, x, theta)
    return student.x0(own.x, own.t, turn.text), own


def known(turn: Turn) -> Known:
    s, problem = turn.settings, turn.problem
    if turn.trains == ("critic",):                                # |x_0 - x|^2 / sin^2
        x, theta = rolled(turn)[0], level(turn, "t")
        own, critic = seen(problem, noised(turn, x, theta), theta), turn.roles["critic"]
        off = (critic.x0(own.x, own.t, turn.text) - x) / own.sin
        slope = critic.slopes(2 * off / own.sin / off.numel(), own.x, own.t, turn.text)
        return Known({"denoising": off.square().mean()}, {"critic": slope})
    value, slope = consistency(turn)
    if turn.step.progress < s.warmup:
        return Known({"consistency": value}, {"student": slope})
    (x, given), theta = rolled(turn), level(turn, "matched t")
    x_t = noised(turn, x, theta, "matched noise")
    real = clean(problem, turn.roles["teacher"], x_t, theta, turn.guided(turn.scale))
    fake = clean(problem, turn.roles["critic"], x_t, theta, turn.text)
    weight = s.matching_weight or problem.dim ** 0.5 / 50
    pull = weight * (fake - real) / (x - real).abs().mean(1, keepdim=True) / x.numel()
    slope = slope + turn.roles["student"].slopes(pull, given.x, given.t, turn.text)
    return Known({"consistency": value, "matching": None}, {"student": slope})


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    return {name: Net.of(problem) for name in ("teacher", "student", "critic")}


ALGORITHM = Algorithm(
    RCM,
    roles,
    orders=lambda settings: [Order(("student",)), Order(("critic",), settings.critic_steps)],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")},
    known=known,
    defaults={"mean": 0.7, "std": 1.6, "damping": 0.1, "matching_weight": None, "critic_steps": 4, "rollout_steps": 4,
              "shift": 5.0},
    times=sampled,
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
