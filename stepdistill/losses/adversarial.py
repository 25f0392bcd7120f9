"""Losses of a discriminator and of who is to fool it. Logits of any shape, higher is more real; the same shape out."""
from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def fool(fake: Tensor) -> Tensor:
    """Non-saturating: -log sigmoid(fake). Goodfellow et al. 2014, arXiv:1406.2661, section 3."""
    return softplus(-fake)


def tell_apart(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(real) - log(1 - sigmoid(fake)): its least value is 2 log 2 where they are alike."""
    return softplus(-real) + softplus(fake)
