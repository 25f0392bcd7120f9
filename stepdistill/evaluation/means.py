"""Figures that are means over pictures or prompts."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .estimate import Estimate, mean_of


def clip_score(images: Tensor, texts: Tensor) -> Estimate:
    """Mean of 100 max(cos, 0) over pairs, Hessel et al. 2021, arXiv:2104.08718. (n, D), (n, D)."""
    chunks = zip(images.split(4096), texts.split(4096), strict=True)
    return mean_of(torch.cat([100 * F.cosine_similarity(x, y).clamp(min=0) for x, y in chunks]))


def diversity(groups: Sequence[Tensor]) -> Estimate:
    """Mean over prompts of the mean distance between two samples of one prompt. groups: (samples, D) of each prompt, at
    least 2."""
    each = [torch.pdist(group.double().cpu()).mean() for group in groups]
    return mean_of(torch.stack(each))
