"""Figures that are means over pictures or prompts."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .estimate import Estimate, mean_of


def clip_score(images: Tensor, texts: Tensor) -> Estimate:
    """Mean of 100 max(cos, 0) over pairs, Hessel et al. 2021, arXiv:2104.08718. (n, D), (n, D); of videos (n, F, D),
    each the mean over its frames."""
    frames, told = ((images, texts) if images.ndim == 2
                    else (images.flatten(0, 1), texts.repeat_interleave(images.shape[1], 0)))
    chunks = zip(frames.split(4096), told.split(4096), strict=True)
    scores = torch.cat([100 * F.cosine_similarity(x, y).clamp(min=0) for x, y in chunks])
    return mean_of(scores.unflatten(0, (len(images), -1)).mean(1))


def of_prompts(seen: Tensor, prompts: int) -> list[Tensor]:
    """Features (n, D) of samples that go through the prompts again and again -> those of each prompt."""
    return [seen[i::prompts] for i in range(min(prompts, len(seen)))]


def diversity(groups: Sequence[Tensor]) -> Estimate:
    """Mean over prompts of the mean distance between two samples of one prompt. groups: (samples, D) of each prompt, at
    least 2; of videos (samples, F, D), whose distance is the root mean square over frames."""
    each = [torch.pdist(group.double().cpu().flatten(1)).mean() / (group[0].numel() / group.shape[-1]) ** 0.5
            for group in groups]
    return mean_of(torch.stack(each))
