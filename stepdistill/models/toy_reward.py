"""The reward of Toy: how sure it is that a point is of the class that its prompt names."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..diffusion.contracts import Condition
from ..diffusion.schedule import RectifiedFlow
from ..diffusion.toy import Toy, labels_of


class ToyReward(nn.Module):
    """reward(points (B, 2, 1, 1), prompts) -> (B,): log p(class | point) of the mixture itself, at most 0, and 0 for
    the prompt of all classes. place: of Toy's folder."""

    def __init__(self, place: str) -> None:
        super().__init__()
        toy = Toy(place)
        self.law = toy.law(RectifiedFlow(), "velocity")
        self.classes = int(toy.labels.max()) + 1
        self.shares = torch.stack([self.law.weights[toy.labels == k].sum() for k in range(self.classes)]
                                  + [self.law.weights.sum()])

    def forward(self, points: Tensor, prompts: Sequence[str]) -> Tensor:
        label, clean = labels_of(list(prompts), self.classes), torch.zeros(len(points), dtype=torch.float64)
        of_class = self.law.log_density(points, clean, Condition(label=label.to(points.device)))
        prior = self.shares[label].log().to(points)                    # -1, all classes, is the last of them
        return prior + of_class - self.law.log_density(points, clean)
