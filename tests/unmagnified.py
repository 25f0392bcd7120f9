"""Comparing weights that were trained in two ways."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch


@contextmanager
def unmagnified() -> Iterator[None]:
    """AdamW made within takes steps that are proportional to the gradient, since its eps is 1.

    AdamW as it is divides a gradient by its own size. Where that is nearly zero, the order of a sum (another batch
    size, thread count or processor) decides a whole step, and weights cannot be compared. Here the last digits of a
    gradient move the last digits of a weight, and a factor that AdamW would hide is seen, such as a mean taken twice.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1.0))
        yield
