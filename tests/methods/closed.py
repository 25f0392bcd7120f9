"""Closed forms for consistency methods: Gaussian data whose mean a condition names, and its discrete fixed point."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.contracts import Batch, Condition
from stepdistill.diffusion.prediction import PARAMETERISATIONS, Prediction
from stepdistill.diffusion.schedule import RectifiedFlow, Schedule, VariancePreserving, like

STD = 0.6
CONDITIONAL, UNCONDITIONAL = (torch.tensor([0.8, -0.5], dtype=torch.float64),
                              torch.tensor([-0.2, 0.3], dtype=torch.float64))


def stable_diffusion() -> VariancePreserving:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return VariancePreserving.of((1 - betas).cumprod(0))


SCHEDULES = {"vp": (stable_diffusion(), "v"), "flow": (RectifiedFlow(), "velocity")}


def predict(x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, kind: str) -> Prediction:
    """What a network of this kind says when it believes in x0; sigma_t > 0."""
    a, b = PARAMETERISATIONS[kind](schedule, t)
    eps = (x_t - like(schedule.alpha(t), x_t) * x0) / like(schedule.sigma(t), x_t)
    return Prediction(like(a, x_t) * x0 + like(b, x_t) * eps, x_t, t, schedule, kind)


@dataclass
class Teacher:
    """E[x_0 | x_t] of N(m, STD^2), m named by cond.text: (B, 2)."""

    schedule: Schedule
    kind: str

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        assert cond.w is None, "the teacher is not told w"
        alpha, m = self.schedule.alpha(t), cond.text
        variance = alpha**2 * STD**2 + self.schedule.sigma(t) ** 2
        x0 = m + like(alpha * STD**2 / variance, x_t) * (x_t - like(alpha, x_t) * m)
        return predict(x0, x_t, t, self.schedule, self.kind)


def contraction(schedule: Schedule, t: Tensor, nodes: int, skip: int = 1) -> Tensor:
    """The product of the factors by which DDIM steps from t to 0 shrink x_t - alpha_t m: (B,)."""
    total = torch.ones_like(t)
    while (t > 0).any():
        r = (t - skip / nodes).clamp_min(0)
        r = torch.where(r < 1e-9, 0.0, r)
        a_t, s_t, a_r, s_r = schedule.alpha(t), schedule.sigma(t), schedule.alpha(r), schedule.sigma(r)
        factor = (a_r * a_t * STD**2 + s_r * s_t) / (a_t**2 * STD**2 + s_t**2)
        total = torch.where(t > 0, total * factor, total)
        t = r
    return total


def guided_mean(cond: Condition, w: float | Tensor) -> Tensor:
    """Linear denoisers of one variance mix into the denoiser of the mixed mean."""
    w = torch.as_tensor(w, dtype=torch.float64).expand(len(cond))[:, None]
    return cond.null.text + w * (cond.text - cond.null.text)


def batch(count: int, offset: int = 0) -> Batch:
    """Samples of the data in float64, so that a loss can be zero."""
    ids = torch.arange(offset, offset + count)
    g = torch.Generator().manual_seed(offset)
    null = Condition(text=UNCONDITIONAL.expand(count, 2))
    cond = Condition(text=CONDITIONAL.expand(count, 2), null=null)
    return Batch(ids, cond, CONDITIONAL + STD * torch.randn(count, 2, generator=g, dtype=torch.float64))
