"""Latents packed into tokens of 2 x 2, the channels first, and back."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

PATCH = 2                                          # latents on a side of a token


def packed(latents: Tensor) -> Tensor:
    """(B, C, H, W) as tokens (B, N, 4 C)."""
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def grid(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Tokens (B, N, D) of latents of this shape (..., H, W) as a map (B, D, H / 2, W / 2)."""
    return tokens.transpose(1, 2).unflatten(2, [side // PATCH for side in shape[-2:]])


def unpacked(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Tokens (B, N, 4 C) as latents of this shape, (B, C, H, W)."""
    return pixel_shuffle(grid(tokens, shape), PATCH)


def packed_noise(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit noise of latents of this shape, drawn as that of their tokens is, on the generator's device."""
    batch, channels, height, width = shape
    tokens = batch, height * width // PATCH**2, channels * PATCH**2
    return unpacked(torch.randn(tokens, generator=generator, dtype=dtype, device=generator.device), shape)
