"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel, a rectified flow on the shifted latents of an AutoencoderKL.

Its time is the noise level: the scheduler's shift shapes grids, not the path.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusers import SD3Transformer2DModel
from torch import Tensor

from ...diffusion.contracts import Condition
from ...errors import RequestError
from ..codecs import shifted
from ..extra_embedding import TimeEmbedding
from . import Family, Parts, Size
from .shared import (
    FLOW,
    channel_refusals,
    clip_skip,
    codec_pixels,
    flow_refusals,
    latent_sides,
    middle_block,
    shift_refusals,
)

if TYPE_CHECKING:
    from ..teacher import Teacher

T5 = ("text_encoder_3", "tokenizer_3")             # what an SD3 without T5 must be told to do without
# max_sequence_length of a stock call: zeros stand in for a missing T5
T5_TOKENS = 256
# The attention layers are those of diffusers' train_dreambooth_lora_sd3.py; the feed-forward layers and the way in of
# time, here the modulations, are what LCM-LoRA adapts in a UNet. No gradient ever reaches add_q_proj of the last block,
# whose text is not read any more.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
           "ff.net.0.proj", "ff.net.2",
           "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear", "norm_out.linear")


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """text (B, L, D), CLIP's tokens before T5's; pooled (B, P). null: the encoding of "", as the stock pipeline
    subtracts it: clip_skip does not concern it."""
    text, _, pooled, _ = teacher.loaded.encode_prompt(
        prompts, None, None, device=teacher.device, do_classifier_free_guidance=False,
        max_sequence_length=teacher.call.get("max_sequence_length", T5_TOKENS),
        clip_skip=None if null else clip_skip(teacher))
    return Condition(text=text, pooled=pooled)


def condition_shapes(parts: Parts, call: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    config = parts["transformer"].config
    tokens = parts["text_encoder"].config.max_position_embeddings + call.get("max_sequence_length", T5_TOKENS)
    return {"text": (tokens, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}


def inputs(network: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    return {"hidden_states": x_t, "timestep": timestep, "encoder_hidden_states": cond.text.to(x_t),
            "pooled_projections": cond.pooled.to(x_t),
            "return_dict": False}


def feature_map(network: SD3Transformer2DModel, output: tuple[Tensor | None, Tensor], x_t: Tensor) -> Tensor:
    """What a block returned, its text tokens and its picture tokens (B, N, D), as a map (B, D, H, W)."""
    _, tokens = output
    height, width = (side // network.config.patch_size for side in x_t.shape[2:])
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def feature_shapes(network: SD3Transformer2DModel, shape: tuple[int, ...]) -> dict[str, tuple[int, int, int]]:
    """Its blocks -> (C, H, W) of their picture tokens."""
    sides = (side // network.config.patch_size for side in shape[1:])
    return dict.fromkeys((f"transformer_blocks.{i}" for i in range(network.config.num_layers)),
                         (network.inner_dim, *sides))


def multiple(parts: Parts) -> int:
    return codec_pixels(parts["vae"]) * parts["transformer"].config.patch_size


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    config, pixels = parts["transformer"].config, codec_pixels(parts["vae"])
    sides = latent_sides(size, config.sample_size, pixels, multiple(parts))
    if max(sides) > (most := config.pos_embed_max_size * config.patch_size):
        raise RequestError(f"its network has positions for sides of {most * pixels} pixels at most; found {size[0]} "
                           f"x {size[1]}")
    return config.in_channels, *sides


def refusals(parts: Parts) -> dict[str, bool]:
    network = parts["transformer"].config
    return {
        **channel_refusals(network.in_channels, network.out_channels, parts["vae"].config.latent_channels),
        **shift_refusals(parts["vae"]),
        **flow_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="sd3", denoiser="transformer", targets=TARGETS, optional=T5, **FLOW,
    time=TimeEmbedding("time_text_embed.timestep_embedder.linear_1", "time_text_embed.time_proj"),
    encode=encode, condition_shapes=condition_shapes, inputs=inputs, feature_shapes=feature_shapes,
    feature_map=feature_map,
    default_features=middle_block,
    latent_shape=latent_shape, multiple=multiple,
    codec=lambda parts: shifted(parts["vae"]), refusals=refusals)
