"""PixArt-Alpha and PixArt-Sigma: PixArtTransformer2DModel on the latents of an AutoencoderKL."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from ...diffusion.contracts import Condition
from ..codecs import scaled
from ..extra_embedding import TimeEmbedding
from . import Family, Parts, Size, sides
from .shared import (
    DISCRETE,
    ONE_STREAM,
    codec_pixels,
    discrete_refusals,
    latent_sides,
    masked_text,
    variance_refusals,
    whole,
)

if TYPE_CHECKING:
    from ..teacher import Teacher

# Attention, feed-forward and the way in of time, which one linear layer brings to all blocks.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "adaln_single.linear")


def reads_sizes(parts: Parts) -> bool:
    config = parts["transformer"].config
    return config.sample_size == 128 if config.use_additional_conditions is None else config.use_additional_conditions


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """text (B, L, D), mask (B, L); time_ids (B, 3) where the network reads sizes: height, width and their ratio."""
    asked = teacher.asked
    text, mask, _, _ = teacher.loaded.encode_prompt(
        prompts, do_classifier_free_guidance=False, device=teacher.device, clean_caption=asked["clean_caption"],
        max_sequence_length=asked["max_sequence_length"])
    sizes = sized(whole(teacher, text)) if reads_sizes(teacher.parts) else None
    return Condition(text=text, mask=mask, time_ids=sizes)


def sized(rows: Tensor) -> Tensor:
    """It is told the size that a picture has, and its ratio, as a call of its pipeline says them: (B, 3)."""
    height, width = rows[:, 4:].unbind(1)
    return torch.stack([height, width, height / width], 1)


def condition_shapes(parts: Parts, call: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return masked_text("caption_channels")(parts, call) | ({"time_ids": (3,)} if reads_sizes(parts) else {})


def inputs(network: PixArtTransformer2DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    sizes, ratio = (None, None) if cond.time_ids is None else cond.time_ids.to(x_t).split((2, 1), 1)
    return {"hidden_states": x_t, "timestep": timestep, "encoder_hidden_states": cond.text.to(x_t),
            "encoder_attention_mask": cond.mask,
            "added_cond_kwargs": {"resolution": sizes, "aspect_ratio": ratio}, "return_dict": False}


def multiple(parts: Parts) -> int:
    return max(8, codec_pixels(parts["vae"]) * parts["transformer"].config.patch_size)


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    config, pixels = parts["transformer"].config, codec_pixels(parts["vae"])
    return config.in_channels, *latent_sides(size, config.sample_size, pixels, multiple(parts))


def refusals(parts: Parts) -> dict[str, bool]:
    side = parts["transformer"].config.sample_size
    return {
        **variance_refusals(parts), **discrete_refusals(parts["scheduler"]),
        f"its network of sample_size {side} reads the sizes of pictures, which PixArtAlphaPipeline tells at 128 alone":
            reads_sizes(parts) and side != 128,
    }


FAMILY = Family(
    name="pixart", denoiser="transformer", targets=TARGETS, seeded_steps=True,
    time=TimeEmbedding("adaln_single.emb.timestep_embedder.linear_1", "adaln_single.emb.time_proj"),
    encode=encode, condition_shapes=condition_shapes, inputs=inputs,
    # it draws the nearest of a table of sizes, and scales
    call=lambda parts, size: {**sides(parts, size), "use_resolution_binning": False},
    latent_shape=latent_shape, multiple=multiple, sized=sized, codec=lambda parts: scaled(parts["vae"]),
    refusals=refusals, **DISCRETE, **ONE_STREAM)
