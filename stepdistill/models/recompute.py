"""Activation checkpointing: the activations of a region are dropped after forward and computed again in backward."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class StopForward(Exception):
    """Leaves a forward pass whose rest nobody needs. A tap raises it, and catches it again."""


def recomputed(module: nn.Module, *args: Any, again: Callable[[], AbstractContextManager] = nullcontext) -> Any:
    """module(*args), computed again in backward, within `again()`: for
    `network.enable_gradient_checkpointing(recomputed)`.

    Torch before 2.13 leaves a region open where an exception passes through it (pytorch/pytorch, pull request 184018),
    and then what follows is dropped and computed again with it. So a region that is left early ends here as any other,
    and is left after that; backward computes again what was computed and no more.
    """
    left = False                                  # not the exception itself: its frames hold the activations

    def region(*args: Any) -> Any:
        nonlocal left
        try:
            return module(*args)
        except StopForward:
            left = True

    given = checkpoint(region, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))
    if left:
        raise StopForward
    return given
