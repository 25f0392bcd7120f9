"""f-divergences D_f = E_q f(r) between a teacher's law p and a student's law q, by the ratio r = p / q of their
densities.

The gradient of D_f in a sample x of q is -h(r) (score of p - score of q) with h(r) = r^2 f''(r), so that every one of
them is the reverse Kullback-Leibler divergence, for which h is 1, with another weight a sample: Xu et al. 2025,
arXiv:2502.15681, theorem 1.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

DivergenceName = Literal["reverse_kl", "forward_kl", "js", "softened_rkl", "hellinger", "jeffreys"]
Function = Callable[[Tensor], Tensor]

# name -> f and h, as functions of r > 0. The law of a student that minimises one covers modes the more, the faster h
# grows with r.
DIVERGENCES: dict[str, tuple[Function, Function]] = {
    "reverse_kl": (lambda r: -r.log(), lambda r: r.new_ones(r.shape)),
    "forward_kl": (lambda r: r * r.log(), lambda r: r),
    "js": (lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (1 + r)),
    "softened_rkl": (lambda r: (r + 1) * (0.5 + 0.5 / r).log(), lambda r: 1 / (1 + r)),
    "hellinger": (lambda r: 2 * (1 - r.sqrt()), lambda r: 0.5 * r.sqrt()),
    "jeffreys": (lambda r: (r - 1) * r.log(), lambda r: 1 + r),
}


def ratio(logits: Tensor, low: float = 0.1, high: float = 20.0, beyond: float = 10.0) -> Tensor:
    """p / q of each sample (B,), of a discriminator's logits (B, K), whose optimum is log p / q: their mean over the K
    heads, never beyond +-`beyond`, and the ratio never outside [low, high], as released with arXiv:2502.15681."""
    return logits.flatten(1).mean(1).clamp(-beyond, beyond).exp().clamp(low, high)


def relative_weight(name: DivergenceName, r: Tensor) -> Tensor:
    """h(r) / h(1), (B,): 1 where teacher and student are alike, whatever the divergence."""
    h = DIVERGENCES[name][1]
    return h(r) / h(r.new_ones(()))
