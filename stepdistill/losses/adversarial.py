"""Losses of a discriminator and of who is to fool it. Logits of any shape, higher is more real; the same shape out."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating: -log sigmoid(fake). Goodfellow et al. 2014, arXiv:1406.2661, section 3."""
    return softplus(-fake)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(real) - log(1 - sigmoid(fake)): its least value is 2 log 2 where they are alike."""
    return softplus(-real) + softplus(fake)


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-fake: Lim & Ye 2017, arXiv:1705.02894, eq. 4."""
    return -fake


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """max(0, 1 - real) + max(0, 1 + fake): its least value is 2 where they are alike. No gradient beyond the
    margins."""
    return relu(1 - real) + relu(1 + fake)


def over_tokens(losses: Sequence[Tensor]) -> Tensor:
    """Of K maps of losses, (B, N) each, the mean over every map's positions, (B, K).

    A hinge is taken before the mean and not after it: each position has a margin of its own, and what is right
    elsewhere does not outvote what is wrong here.
    """
    return torch.stack([loss.mean(1) for loss in losses], dim=1)


def r1(logits: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """|d sum_k logits_k / d inputs|^2, (B,): Mescheder et al. 2018, arXiv:1801.04406, eq. 9, at real `inputs` (B, ...)
    each.

    logits (B, K), those of a sample functions of its own inputs alone. Differentiable: what made the logits is what it
    trains.
    """
    slopes = torch.autograd.grad(logits.sum(), list(inputs), create_graph=True)
    return sum(slope.square().flatten(1).sum(1) for slope in slopes)
