"""Uni-Instruct by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Frozen, Heads, Trained
from ..methods.distribution.uni_instruct import UniInstruct
from .affine import Net, QuadraticHeads, softplus
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, denoised, laws, noise_level, output_scale, rolled, rows
from .paths_dmd2 import OnCritic, logits_at
from .problem import Check, Problem

NOW, MANY = {"ratio_start": 0}, (0, 1, 2, 3)
# of each divergence, by r: h(r) / h(1), its slope in log r, the elasticity e of h, and that of e
H: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "reverse_kl": lambda r: (1 + 0 * r, 0 * r, 0 * r, 0 * r),
    "forward_kl": lambda r: (r, r, 1 + 0 * r, 0 * r),
    "js": lambda r: (2 * r / (1 + r), 2 * r / (1 + r) ** 2, 1 / (1 + r), -r / (1 + r) ** 2),
    "softened_rkl": lambda r: (2 / (1 + r), -2 * r / (1 + r) ** 2, -r / (1 + r), -r / (1 + r) ** 2),
    "hellinger": lambda r: (r**0.5, r**0.5 / 2, 0.5 + 0 * r, 0 * r),
    "jeffreys": lambda r: ((1 + r) / 2, r / 2, r / (1 + r), r / (1 + r) ** 2),
}
PATHS = (
    Path("the defaults, before and after the ratio is read", moments=(0, 389, 390), elsewhere=True),
    *(Path(f"divergence {name}", NOW | {"divergence": name}) for name in H),
    Path("shapes/uni_instruct", {"critic_steps": 2, "ratio_start": 200, "critic_gan_weight": 0.1}, moments=(199, 200),
         elsewhere=True),
    Path("toy/uni_instruct, not guided", {"critic_steps": 3, "ratio_start": 200, "gan_weight": 0.0,
                                          "critic_gan_weight": 0.1, "t_range": (0.02, 0.9)}, guidance=1.0,
         moments=(0, 200), elsewhere=True),
    Path("a range of guidance, 4 steps", NOW, steps=4, guidance=(1.5, 4.0), moments=MANY),
    Path("a teacher with its guidance within", NOW, within=True),
    Path("critic_steps 3", NOW | {"critic_steps": 3}),
    Path("gan_weight 0.7", NOW | {"gan_weight": 0.7}),
    Path("critic_gan_weight 0.3", NOW | {"critic_gan_weight": 0.3}),
    Path("t_range from 0.3 to 0.6", NOW | {"t_range": (0.3, 0.6)}),
    *laws(ratio_start=0),
)


def known(turn: Turn) -> Known:
    return of_student(turn) if turn.trains == ("student",) else of_critic(turn)


def of_student(turn: Turn) -> Known:
    """L = w h [ (1 - e) / 2 |d|^2 + <d, fake - x> ] over the numbers of a sample, e the elasticity of h."""
    s, sample, t = turn.settings, rolled(turn), noise_level(turn, turn.step.uniform("t"))
    teacher, student, critic = (turn.roles[name] for name in ("teacher", "student", "critic"))
    x_t, at, heads = (turn.noised(sample.x, t), turn.problem.schedule.alpha(t)[:, None],
                      turn.roles["discriminator"].heads)
    real, fake, logits = (teacher.x0(x_t, t, turn.guided(turn.scale)), critic.x0(x_t, t, turn.text),
                          logits_at(turn, x_t, t, None))
    log_r = logits.mean(1).clamp(-10, 10)
    r, begun = log_r.exp().clamp(0.1, 20), turn.step.index >= s.ratio_start
    within = begun * ((log_r.exp() > 0.1) & (log_r.exp() < 20)).double()      # elsewhere r stands still
    h, dh, e, de = (each[:, None] for each in H[s.divergence](r if begun else torch.ones_like(r)))
    weight, d, off = 1 / (sample.x - real).abs().mean(1, keepdim=True), real - fake, fake - sample.x
    inner = (1 - e) / 2 * d**2 + d * off
    of_real, of_fake = weight * h * ((1 - e) * d + off), weight * h * (e * d - off)
    of_logits = weight * (dh * inner - h * de / 2 * d**2)
    count, K = d.numel(), logits.shape[1]
    pull = at * (teacher.back(of_real, t) + critic.back(of_fake, t)) - weight * h * d
    judged = (within * of_logits.sum(1))[:, None].expand(-1, K) / K / count
    values = {"identity": (weight * h * inner).mean()}
    if s.gan_weight:
        values["gan"] = s.gan_weight * softplus(-logits).mean()
        judged = judged - s.gan_weight * torch.sigmoid(-logits) / logits.numel()
    pull = pull / count + at * critic.back(heads.back(judged, fake), t)
    return Known(values, {"student": student.slopes(pull, sample.given, sample.t, turn.text)},
                 unchecked=("teacher", "critic", "discriminator"))


def of_critic(turn: Turn) -> Known:
    """Data and samples under one noise at one level."""
    s, critic, t = turn.settings, turn.roles["critic"], noise_level(turn, turn.step.uniform("t"))
    sample, heads = rolled(turn), turn.roles["discriminator"].heads
    value, slope = denoised(turn, sample.x, t, turn.text, output_scale(turn, t) ** 2)
    game, slope_of_heads = torch.zeros(()), 0
    for clean, sign in ((sample.x, 1), (turn.x0, -1)):
        x_t = turn.noised(clean, t)
        logits, features = logits_at(turn, x_t, t, None), critic.x0(x_t, t, turn.text)
        game = game + s.critic_gan_weight * softplus(sign * logits).mean()
        pull = s.critic_gan_weight * sign * torch.sigmoid(sign * logits) / logits.numel()
        slope_of_heads = slope_of_heads + heads.slopes(pull, features, t[:, None], turn.text)
        slope = slope + critic.slopes(heads.back(pull, features), x_t, t, turn.text)
    return Known({"denoising": value, "discriminator": game}, {"critic": slope, "discriminator": slope_of_heads})


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {name: Net.of(problem) for name in ("teacher", "student", "critic")}
    heads = QuadraticHeads.of(problem, problem.dim)
    heads.numbers["Q"].data *= 0.1                                # ratios that are not all cut off
    return found | {"discriminator": OnCritic(found["critic"], heads)}


ALGORITHM = Algorithm(
    UniInstruct, roles,
    orders=lambda settings: [Order(("critic", "discriminator"), settings.critic_steps), Order(("student",))],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher"),
                            "discriminator": Heads("critic")},
    known=known,
    defaults={"divergence": "js", "critic_steps": 1, "ratio_start": 390, "gan_weight": 0.01, "critic_gan_weight": 1.0,
              **NOISE},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
