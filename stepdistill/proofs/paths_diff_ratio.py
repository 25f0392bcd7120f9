"""DiffRatio by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.base import Heads, Trained
from ..methods.distribution.diff_ratio import DiffRatio
from .affine import Net, QuadraticHeads, softplus
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, laws, noise_level, rolled, rows
from .paths_dmd2 import OnCritic
from .paths_f_distill import H
from .problem import Check, Problem

MANY = (0, 1, 2, 3)
PATHS = (
    Path("the defaults", elsewhere=True),
    Path("shapes/diff_ratio", {"critic_steps": 2}, guidance=1.0, elsewhere=True),
    Path("toy/diff_ratio, not guided", {"critic_steps": 2, "t_range": (0.02, 0.7)}, guidance=1.0, elsewhere=True),
    Path("a range of guidance, which nothing reads", guidance=(1.5, 4.0)),
    Path("critic_steps 3, fresh samples after the first", {"critic_steps": 3}, steps=2, moments=MANY),
    Path("4 steps", steps=4, moments=MANY),
    *(Path(f"divergence {name}", {"divergence": name}) for name in H),
    Path("weighed as scores", {"weight": "score"}),
    Path("weighed as scores, to t = 1", {"weight": "score", "t_range": (0.0, 1.0)}),
    Path("weighed as x_0", {"weight": "x0"}),
    Path("t_range from 0.3 to 0.6", {"t_range": (0.3, 0.6)}),
    *laws(),
)


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    student, critic = (Net.of(problem) for _ in range(2))
    return {"student": student, "critic": critic, "discriminator": OnCritic(critic, QuadraticHeads.of(problem,
                                                                                                      problem.dim))}


@torch.no_grad()
def logits_at(turn: Turn, x_t: Tensor, t: Tensor) -> Tensor:
    return turn.roles["discriminator"](x_t, t, Condition(text=turn.text))


def known(turn: Turn) -> Known:
    return of_student(turn) if turn.trains == ("student",) else of_critic(turn)


def of_student(turn: Turn) -> Known:
    s, sample, schedule = turn.settings, rolled(turn), turn.problem.schedule
    t = noise_level(turn, turn.step.uniform("t"))
    x_t, alpha, sigma = turn.noised(sample.x, t), schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    heads, critic, logits = turn.roles["discriminator"].heads, turn.roles["critic"], logits_at(turn, x_t, t)
    r = torch.exp(logits.mean(1, keepdim=True).clamp(-10, 10)).clamp(0.1, 20)
    weight = H[s.divergence](r) * {"score": 1, "eps": sigma / alpha, "x0": (sigma / alpha) ** 2}[s.weight]
    up = -weight.expand_as(logits) / logits.numel()
    pull = alpha * critic.back(heads.back(up, critic.x0(x_t, t, turn.text)), t)
    slopes = turn.roles["student"].slopes(pull, sample.given, sample.t, turn.text)
    return Known({"log_ratio": -(weight * logits).mean()}, {"student": slopes}, unchecked=("critic", "discriminator"))


def of_critic(turn: Turn) -> Known:
    """Data and samples under one noise at one level."""
    t, heads, critic = (noise_level(turn, turn.step.uniform("t"), whole=True), turn.roles["discriminator"].heads,
                        turn.roles["critic"])
    value, slope, slope_of_heads = torch.zeros(()), 0, 0
    for clean, sign in ((turn.x0, -1), (rolled(turn.before or turn).x, 1)):
        x_t = turn.noised(clean, t)
        logits, features = logits_at(turn, x_t, t), critic.x0(x_t, t, turn.text)
        value = value + softplus(sign * logits).mean()
        pull = sign * torch.sigmoid(sign * logits) / logits.numel()
        slope_of_heads = slope_of_heads + heads.slopes(pull, features, t[:, None], turn.text)
        slope = slope + critic.slopes(heads.back(pull, features), x_t, t, turn.text)
    return Known({"discriminator": value}, {"critic": slope, "discriminator": slope_of_heads})


ALGORITHM = Algorithm(
    DiffRatio, roles,
    orders=lambda settings: [Order(("student",)), Order(("critic", "discriminator"), settings.critic_steps, 1)],
    needs=lambda settings: {"student": Trained("teacher"), "critic": Trained("teacher"),
                            "discriminator": Heads("critic")},
    known=known,
    defaults={"divergence": "reverse_kl", "weight": "eps", "critic_steps": 1, **NOISE},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
