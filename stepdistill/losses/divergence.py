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

# name -> f, h and its elasticity r h'(r) / h(r), as functions of r > 0. The law of a student that minimises one covers
# modes the more, the faster h grows with r.
DIVERGENCES: dict[str, tuple[Function, Function, Function]] = {
    "reverse_kl": (lambda r: -r.log(), lambda r: r.new_ones(r.shape), lambda r: r.new_zeros(r.shape)),
    "forward_kl": (lambda r: r * r.log(), lambda r: r, lambda r: r.new_ones(r.shape)),
    "js": (lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (1 + r), lambda r: 1 / (1 + r)),
    "softened_rkl": (lambda r: (r + 1) * (0.5 + 0.5 / r).log(), lambda r: 1 / (1 + r), lambda r: -r / (1 + r)),
    "hellinger": (lambda r: 2 * (1 - r.sqrt()), lambda r: 0.5 * r.sqrt(), lambda r: r.new_full(r.shape, 0.5)),
    "jeffreys": (lambda r: (r - 1) * r.log(), lambda r: 1 + r, lambda r: r / (1 + r)),
}


def ratio(logits: Tensor, low: float = 0.1, high: float = 20.0, beyond: float = 10.0) -> Tensor:
    """p / q of each sample (B,), of a discriminator's logits (B, K), whose optimum is log p / q: their mean over the K
    heads, never beyond +-`beyond`, and the ratio never outside [low, high], as released with arXiv:2502.15681."""
    return logits.flatten(1).mean(1).clamp(-beyond, beyond).exp().clamp(low, high)


def relative_weight(name: DivergenceName, r: Tensor) -> Tensor:
    """h(r) / h(1), (B,): 1 where teacher and student are alike, whatever the divergence."""
    h = DIVERGENCES[name][1]
    return h(r) / h(r.new_ones(()))


def elasticity(name: DivergenceName, r: Tensor) -> Tensor:
    """r h'(r) / h(r), (B,): 0 of the reverse Kullback-Leibler divergence, 1 of the forward one."""
    return DIVERGENCES[name][2](r)


def mixture_weight(share: Tensor, r: Tensor) -> Tensor:
    """h(r) of the skewed Jensen-Shannon divergence over its value at 1, (B,): r / (share r + 1 - share).

    Times share it is the probability that a sample of the mixture share p + (1 - share) q comes of p. At share 1 it is
    the reverse Kullback-Leibler divergence's, at 0 the forward one's. Jayashankar et al. 2025, arXiv:2502.09609.
    """
    return r / (share * r + 1 - share)


def mixture_logits(logits: Tensor, share: Tensor) -> Tensor:
    """Of a sample of the mixture being p's, (B, K), where logits are log p / q: higher by log(share / (1 - share))."""
    return logits + share.logit()[:, None].to(logits)
