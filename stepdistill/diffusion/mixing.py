"""A solver that looks back, on a network that stays as it is: each step of DDIM but the first takes a share of what the
network's output has changed by since the step before. Kim, Tang & Yu 2023, arXiv:2309.16421."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .contracts import Condition
from .flow_map import ddim_step
from .prediction import Prediction
from .wrapper import Wrapper

Output = Literal["eps", "x0"]


@dataclass(frozen=True, eq=False)
class Mixing(Wrapper):
    """A role that is sampled by a solver of its own. shares: (k - 1,), of the steps after the first, for a sampler of k
    steps; output: which view of its predictions they are of."""

    shares: Tensor
    output: Output

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        return self.role(x_t, t, cond)


def mixed_step(before: Prediction, here: Prediction, r: Tensor, share: Tensor | float, output: Output) -> Tensor:
    """DDIM's step from here.t to r, and a share of the change of the output: x_r = ddim + share (o - o_before). share:
    a number, () as a tensor."""
    return ddim_step(here, r) + share * (here.view(output) - before.view(output))


def mixed_rule(history: list[Prediction], r: Tensor, noise: Tensor | None, share: float, output: Output) -> Tensor:
    """As `readers.Rule`."""
    return mixed_step(history[-2], history[-1], r, share, output)
