"""A running average of parameters: what every role that follows another is made of."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ema:
    """shadow <- decay shadow + (1 - decay) leader, in float32, in one fused call.

    shadow, leader: tensors of equal shapes, in the same order; the shadow is changed in place and its owner is
    whoever made it (an adapter, a copy of a network), so it is saved and loaded there. decay in [0, 1]; at 0 the shadow
    equals its leader exactly.
    """

    def __init__(self, shadow: Sequence[Tensor], leader: Sequence[Tensor], decay: float) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"the decay of a running average lies in [0, 1], found {decay}")
        if [s.shape for s in shadow] != [x.shape for x in leader]:
            raise ValueError(f"a running average of {len(leader)} tensors needs a shadow of the same shapes, "
                             f"found {len(shadow)} tensors")
        if wrong := {x.dtype for x in (*shadow, *leader)} - {torch.float32}:
            raise ValueError(f"a running average is kept in float32, found {sorted(map(str, wrong))}: in 16 bits steps "
                             "of "
                             "1 - decay are lost to rounding")
        self.shadow, self.leader, self.decay = list(shadow), list(leader), decay

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shadow, self.leader, 1 - self.decay)
