"""SMD and SMT by hand, on each path of their settings."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..methods.base import Frozen, Heads, Trained
from ..methods.distribution.smd import SMD
from .affine import Net, QuadraticDiscriminator, QuadraticHeads
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, denoised, laws, noise_level, output_scale, rolled, rows
from .problem import Check, Problem

ONE, DATA = {"critic_steps": 1}, {"source": "data", "critic_steps": 1}
MANY = (0, 1, 2, 3)
PATHS = (
    Path("the defaults", elsewhere=True),
    Path("shapes/smd", {"critic_steps": 2}, moments=(0, 1), elsewhere=True),
    Path("toy/smd, not guided", {"critic_steps": 2, "gan_weight": 0.0, "t_range": (0.02, 0.7)}, guidance=1.0,
         elsewhere=True),
    Path("SMT", DATA, moments=(0, 1), elsewhere=True),
    Path("SMT, any shares, 4 steps", DATA | {"shares": (0.0, 1.0), "none": 0.6}, steps=4, moments=MANY),
    Path("a range of guidance, 4 steps", ONE, steps=4, guidance=(1.5, 4.0), moments=MANY),
    Path("a teacher with its guidance within", ONE, within=True),
    Path("shares of one half", ONE | {"shares": (0.5, 0.5)}),
    Path("DMD's share alone", ONE | {"shares": (1.0, 1.0)}),
    Path("no share at 0", ONE | {"none": 0.0}),
    Path("critic_steps 3", {"critic_steps": 3}),
    Path("gan_weight 0.7", ONE | {"gan_weight": 0.7}),
    Path("t_range from 0.3 to 0.6", ONE | {"t_range": (0.3, 0.6)}),
    *laws(**ONE),
)


def known(turn: Turn) -> Known:
    if turn.trains == ("student",):
        return of_student(turn)
    return learned(turn) if turn.settings.source == "data" else of_critic(turn)


def of_student(turn: Turn) -> Known:
    s, sample, critic, t = turn.settings, rolled(turn), turn.roles["critic"], noise_level(turn, turn.step.uniform("t"))
    a = (s.shares[0] + (s.shares[1] - s.shares[0]) * turn.step.uniform("share"))[:, None]
    x_t, slopes = turn.noised(sample.x, t), lambda pull: turn.roles["student"].slopes(pull, sample.given,
                                                                                      sample.t, turn.text)
    if s.source == "data":                                        # by what the critic says at 0, a and 1
        at = lambda share: critic.x0(x_t, t, turn.text, share[:, 0])
        zero, mixed, one = at(0 * a), at(a), at(0 * a + 1)
        larger = [(y - zero).square().mean(1, keepdim=True) + 1e-6 for y in (one, mixed)]
        pull = (zero - mixed) * (larger[0] / larger[1]).sqrt() / (sample.x - one).abs().mean(1, keepdim=True)
        return Known({"matching": None}, {"student": slopes(pull / pull.numel())})
    real, fake = turn.roles["teacher"].x0(x_t, t, turn.guided(turn.scale)), critic.x0(x_t, t, turn.text)
    heads, logits = QuadraticHeads(turn.roles["discriminator"].numbers), logits_at(turn, x_t, t)
    r = torch.exp(logits.mean(1, keepdim=True).clamp(-10, 10)).clamp(0.1, 20)
    pull = r / (a * r + 1 - a) * (fake - real) / (sample.x - real).abs().mean(1, keepdim=True) / real.numel()
    if not s.gan_weight:
        return Known({"matching": None}, {"student": slopes(pull)}, unchecked=("discriminator",))
    odds = (1 - a) / a * torch.exp(-logits)                       # of not being the teacher's
    fooled = -s.gan_weight * odds / (1 + odds) / logits.numel()
    pull = pull + turn.problem.schedule.alpha(t)[:, None] * heads.back(fooled, x_t)
    return Known({"matching": None, "gan": s.gan_weight * torch.log1p(odds).mean()}, {"student": slopes(pull)},
                 unchecked=("discriminator",))


@torch.no_grad()
def logits_at(turn: Turn, x_t: Tensor, t: Tensor) -> Tensor:
    return turn.roles["discriminator"](x_t, t, Condition(text=turn.text))


def share(turn: Turn) -> Tensor:
    return (turn.step.uniform("none") >= turn.settings.none) * turn.step.uniform("share")


def of_critic(turn: Turn) -> Known:
    """Data and samples under one noise at one level; of heads the squared probability to be wrong, times |v - v|^2."""
    t, a, sample = noise_level(turn, turn.step.uniform("t"), whole=True), share(turn)[:, None], rolled(turn)
    schedule, heads = turn.problem.schedule, QuadraticHeads(turn.roles["discriminator"].numbers)
    in_v = ((schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2) / schedule.sigma(t))[:, None]
    value, slope = denoised(turn, sample.x, t, turn.text, output_scale(turn, t) ** 2)
    mixture, slope_of_heads = torch.zeros(()), 0
    for clean, of_data in ((sample.x, False), (turn.x0, True)):
        x_t = turn.noised(clean, t)
        apart = turn.roles["teacher"].x0(x_t, t, turn.guided(turn.scale)) - turn.roles["critic"].x0(x_t, t, turn.text)
        weight = (a if of_data else 1 - a) * (in_v * apart).square().mean(1, keepdim=True)
        odds = a / (1 - a) * torch.exp(logits_at(turn, x_t, t))
        D = odds / (1 + odds)
        wrong = 1 - D if of_data else D
        mixture = mixture + (weight * wrong**2).mean()
        pull = (-1 if of_data else 1) * 2 * weight * wrong * D * (1 - D) / D.numel()
        slope_of_heads = slope_of_heads + heads.slopes(pull, x_t, t[:, None], turn.text)
    return Known({"denoising": value, "mixture": mixture}, {"critic": slope, "discriminator": slope_of_heads})


def learned(turn: Turn) -> Known:
    """Both parts of a mixture, denoised by a critic that reads its share."""
    t, a, value, slope = noise_level(turn, turn.step.uniform("t"), whole=True), share(turn), torch.zeros(()), 0
    for clean, weight in ((rolled(turn).x, 1 - a), (turn.x0, a)):
        more = denoised(turn, clean, t, turn.text, weight * output_scale(turn, t) ** 2, a)
        value, slope = value + more[0], slope + more[1]
    return Known({"denoising": value}, {"critic": slope})


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {name: Net.of(problem) for name in ("teacher", "student", "critic")}
    heads = QuadraticDiscriminator(QuadraticHeads.of(problem, problem.dim).numbers)
    return (found | {"discriminator": heads} if settings.source == "teacher"
            else {k: found[k] for k in ("student", "critic")})


def needs(settings: Any) -> dict[str, Any]:
    if settings.source == "data":
        return {"student": Trained("teacher"), "critic": Trained("teacher", ("share",))}
    return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher"),
            "discriminator": Heads("teacher")}


def orders(settings: Any) -> list[Order]:
    two = ("critic", "discriminator")
    return [Order(("student",)), Order(two if settings.source == "teacher" else two[:1], settings.critic_steps)]


ALGORITHM = Algorithm(
    SMD, roles, orders, needs, known,
    defaults={"source": "teacher", "shares": (0.5, 1.0), "none": 0.25, "critic_steps": 5, "gan_weight": 3e-3, **NOISE},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
