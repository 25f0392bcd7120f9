"""f-distill by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.base import Frozen, Heads, Trained
from ..methods.distribution.f_distill import FDistill
from .affine import Net, QuadraticDiscriminator, QuadraticHeads, softplus
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, denoised, laws, noise_level, output_scale, rolled, rows
from .problem import Check, Problem

MANY = (0, 1, 2, 3)                     # moments, so that exits differ
SHARED = {"critic_steps": 2, "share_rollout": True}
H: dict[str, Callable[[Tensor], Tensor]] = {        # h(r) / h(1)
    "reverse_kl": torch.ones_like, "forward_kl": lambda r: r, "js": lambda r: 2 * r / (r + 1),
    "softened_rkl": lambda r: 2 / (r + 1),
    "hellinger": torch.sqrt, "jeffreys": lambda r: (1 + r) / 2}
PATHS = (
    Path("the defaults", elsewhere=True),
    Path("shapes/f_distill", SHARED, steps=4, moments=MANY, elsewhere=True),
    *(Path(f"divergence {name}", {"divergence": name, "critic_steps": 1}) for name in H),
    Path("toy/f_distill, not guided", {"critic_steps": 3, "share_rollout": True, "gan_weight": 0.0,
                                       "t_range": (0.02, 0.7)}, guidance=1.0,
         elsewhere=True),
    Path("a range of guidance", {"critic_steps": 1}, guidance=(1.5, 4.0)),
    Path("critic_steps 3, fresh samples after the first", {"critic_steps": 3}, steps=2, moments=MANY),
    Path("a teacher with its guidance within", {"critic_steps": 1}, within=True),
    Path("gan_weight 0.7", {"gan_weight": 0.7, "critic_steps": 1}),
    Path("t_range from 0.3 to 0.6", {"t_range": (0.3, 0.6), "critic_steps": 1}),
    *laws(critic_steps=1),
)


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {name: Net.of(problem) for name in ("teacher", "student", "critic")}
    return found | {"discriminator": QuadraticDiscriminator(QuadraticHeads.of(problem, problem.dim).numbers)}


def known(turn: Turn) -> Known:
    return of_student(turn) if turn.trains == ("student",) else of_critic(turn)


def of_student(turn: Turn) -> Known:
    s, sample, student = turn.settings, rolled(turn), turn.roles["student"]
    t = noise_level(turn, turn.step.uniform("t"))
    x_t = turn.noised(sample.x, t)
    real = turn.roles["teacher"].x0(x_t, t, turn.guided(turn.scale))
    fake = turn.roles["critic"].x0(x_t, t, turn.text)
    heads, logits = QuadraticHeads(turn.roles["discriminator"].numbers), logits_at(turn, x_t, t)
    r = torch.exp(logits.mean(1).clamp(-10, 10)).clamp(0.1, 20)
    pull = H[s.divergence](r)[:, None] * (fake - real) / (sample.x - real).abs().mean(1, keepdim=True) / real.numel()
    slopes = lambda pull: student.slopes(pull, sample.given, sample.t, turn.text)
    if not s.gan_weight:
        return Known({"matching": None}, {"student": slopes(pull)}, unchecked=("discriminator",))
    fooled = -s.gan_weight * torch.sigmoid(-logits) / logits.numel()
    pull = pull + turn.problem.schedule.alpha(t)[:, None] * heads.back(fooled, x_t)
    value = s.gan_weight * softplus(-logits).mean()
    return Known({"matching": None, "gan": value}, {"student": slopes(pull)}, unchecked=("discriminator",))


@torch.no_grad()
def logits_at(turn: Turn, x_t: Tensor, t: Tensor) -> Tensor:
    return turn.roles["discriminator"](x_t, t, Condition(text=turn.text))


def of_critic(turn: Turn) -> Known:
    t = noise_level(turn, turn.step.uniform("t"), whole=True)
    sample = rolled(turn.before or turn)                          # the student's own where it is shared
    value, slope = denoised(turn, sample.x, t, turn.text, output_scale(turn, t) ** 2)
    heads, t_real = (QuadraticHeads(turn.roles["discriminator"].numbers),
                     noise_level(turn, turn.step.uniform("real t"), whole=True))
    game, slope_of_heads = torch.zeros(()), 0
    for x_t, at, sign in ((turn.noised(sample.x, t), t, 1), (turn.noised(turn.x0, t_real, "real noise"), t_real, -1)):
        logits = logits_at(turn, x_t, at)
        game = game + softplus(sign * logits).mean()
        pull = sign * torch.sigmoid(sign * logits) / logits.numel()
        slope_of_heads = slope_of_heads + heads.slopes(pull, x_t, at[:, None], turn.text)
    return Known({"denoising": value, "discriminator": game}, {"critic": slope, "discriminator": slope_of_heads})


def orders(settings: Any) -> list[Order]:
    count = settings.critic_steps
    return [Order(("student",)), Order(("critic", "discriminator"), count, count if settings.share_rollout else 1)]


ALGORITHM = Algorithm(
    FDistill, roles, orders,
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher"),
                            "discriminator": Heads("teacher")},
    known=known,
    defaults={"divergence": "js", "critic_steps": 5, "share_rollout": False, **NOISE, "gan_weight": 3e-3},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
