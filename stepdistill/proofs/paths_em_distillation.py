"""EM Distillation by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..methods.base import Frozen, Trained
from ..methods.hybrid.em_distillation import EMDistillation
from .affine import Net
from .paths import (
    NOISE,
    Algorithm,
    Known,
    Order,
    Path,
    Turn,
    denoised,
    first,
    laws,
    noise_level,
    output_scale,
    rolled,
    rows,
)
from .problem import Check, Problem

PATHS = (
    Path("the defaults", elsewhere=True),
    Path("shapes/em_distillation", {"langevin_steps": 4, "critic_steps": 2}, elsewhere=True),
    Path("toy/em_distillation, not guided", {"langevin_steps": 3, "latent_rate": 1e-4, "critic_steps": 2,
                                             "t_range": (0.02, 0.7)}, guidance=1.0, elsewhere=True),
    Path("a range of guidance", guidance=(1.5, 4.0)),
    Path("a teacher with its guidance within", within=True),
    Path("one step", {"langevin_steps": 1}),
    Path("noise_rate 0.5", {"noise_rate": 0.5}),
    Path("latent_rate 0", {"latent_rate": 0.0}),
    Path("latent_rate 0.01", {"latent_rate": 0.01, "t_range": (0.3, 0.7)}),
    Path("critic_steps 3", {"critic_steps": 3}),
    Path("t_range from 0.3 to 0.6", {"t_range": (0.3, 0.6)}),
    *laws(),
)


def known(turn: Turn) -> Known:
    s, student, critic = turn.settings, turn.roles["student"], turn.roles["critic"]
    if turn.trains == ("critic",):
        t = noise_level(turn, turn.step.uniform("t"), whole=True)
        value, slope = denoised(turn, rolled(turn).x, t, turn.text, output_scale(turn, t) ** 2)
        return Known({"denoising": value}, {"critic": slope})
    t, begins = noise_level(turn, turn.step.uniform("t")), torch.full((len(turn.text),), first(s), dtype=torch.float64)
    alpha, sigma = turn.problem.schedule.alpha(t)[:, None], turn.problem.schedule.sigma(t)[:, None]
    z, eps, drifts, g, u = turn.noise("start"), turn.noise("noise"), [], s.noise_rate, s.latent_rate
    for i in range(s.langevin_steps):
        x = student.x0(z, begins, turn.text)
        x_t = alpha * x + sigma * eps
        real, fake = turn.roles["teacher"].x0(x_t, t, turn.guided(turn.scale)), critic.x0(x_t, t, turn.text)
        scores = alpha / sigma**2 * (real - fake)
        eps = eps + g * (sigma * scores - eps) + (2 * g) ** 0.5 * turn.noise(f"noise {i}")
        z = z + u * (student.back(alpha * scores, begins) - z) + (2 * u) ** 0.5 * (turn.noise(f"latent {i}")
                                                                                   if u else 0)
        drifts.append(g * sigma * scores)
    left = sum((1 - g) ** (len(drifts) - 1 - i) * drift for i, drift in enumerate(drifts)) * sigma / alpha
    left = left / sum(g * (1 - g) ** i for i in range(len(drifts)))
    pull = -left / (x - real).abs().mean(1, keepdim=True) / x.numel()
    return Known({"matching": None}, {"student": student.slopes(pull, z, begins, turn.text)})


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    return {name: Net.of(problem) for name in ("teacher", "student", "critic")}


ALGORITHM = Algorithm(
    EMDistillation, roles,
    orders=lambda settings: [Order(("student",)), Order(("critic",), settings.critic_steps)],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")},
    known=known,
    defaults={"langevin_steps": 8, "noise_rate": 0.16, "latent_rate": 1.6e-5, **NOISE},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
