"""PixArt-Alpha: PixArt-Sigma with fewer tokens, whose network of 1024 pixels is told sizes."""
from __future__ import annotations

from dataclasses import replace
from functools import partial

from . import Parts
from .pixart import FAMILY as SIGMA
from .pixart import common_refusals, condition_shapes, reads_sizes

TOKENS = 120                                       # max_sequence_length of a stock call


def refusals(parts: Parts) -> dict[str, bool]:
    side = parts["transformer"].config.sample_size
    return common_refusals(parts) | {f"its network of sample_size {side} reads the sizes of pictures, and its pipeline tells them at 128 alone":
                                     reads_sizes(parts) and side != 128}


FAMILY = replace(SIGMA, name="pixart_alpha", condition_shapes=partial(condition_shapes, tokens=TOKENS), refusals=refusals)
