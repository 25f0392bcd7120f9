"""What the samples of a batch are drawn away from, where a student is to know negative prompts."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..diffusion.contracts import Condition
from ..diffusion.draws import fractions, key
from .text import Text


@dataclass(frozen=True)
class Negatives:
    """Numbered negative prompts, drawn anew for each visit of a sample.

    text: their conditions, as a stock pipeline encodes what it subtracts. count: how many, None where they never end.
    share: of the samples that are given one, in (0, 1]; the others keep their null.
    """

    text: Text
    count: int | None
    share: float

    def of(self, ids: Tensor, walk: int) -> Condition:
        """ids (B,) int64: the samples of a batch; walk: the key of all draws of their data. A function of both."""
        drawn = fractions(key(walk, "negative"), ids, 2)
        own = ids + (key(walk, "negatives") >> 2) if self.count is None else (drawn[:, 0] * self.count).long()
        return self.text(own).dropped(drawn[:, 1] >= self.share).replace(null=None)
