"""Wan 2.1, and Wan 2.2 with one network: WanTransformer3DModel, a rectified flow on the latents of an AutoencoderKLWan.

Samples are videos: a state is (B, C, F, H, W). The pipeline of Wan 2.2 5B tells its network a time for every token, in
text to video one and the same for all: told it once a sample, the network computes the same, and keeps less.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from ...diffusion.contracts import Condition
from ...errors import RequestError
from ..codecs import video
from ..extra_embedding import TimeEmbedding
from ..stock import Prompts
from . import Family, Parts, Size
from .shared import FLOW, channel_refusals, latent_sides, solved_flow_refusals

if TYPE_CHECKING:
    from ..teacher import Teacher

# What the published few-step LoRAs of Wan adapt, attention and feed-forward layers; beside them the way in of time.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "condition_embedder.time_proj")


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """text (B, L, D), zeros after a prompt's end, which the network attends to. null: that of ""."""
    text, _ = teacher.loaded.encode_prompt(prompts, do_classifier_free_guidance=False, device=teacher.device,
                                           max_sequence_length=teacher.asked["max_sequence_length"])
    return Condition(text=text)


def inputs(network: WanTransformer3DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    return {"hidden_states": x_t, "timestep": timestep, "encoder_hidden_states": cond.text.to(x_t),
            "return_dict": False}


def multiple(parts: Parts) -> int:
    return max(16, parts["vae"].config.scale_factor_spatial * max(parts["transformer"].config.patch_size[1:]))


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    vae, config, (*sides, frames) = parts["vae"].config, parts["transformer"].config, size
    pixels, each = vae.scale_factor_spatial, vae.scale_factor_temporal
    if frames % each != 1:
        raise RequestError(f"its videos have a multiple of {each} frames and one, such as {each + 1} or "
                           f"{20 * each + 1}; found {frames}")
    sides = latent_sides(tuple(sides), (0, 0), pixels, multiple(parts))
    return config.in_channels, (frames - 1) // each + 1, *sides


def tokens(network: WanTransformer3DModel, sides: tuple[int, ...]) -> tuple[int, ...]:
    """Along frames, height and width of latents."""
    return tuple(side // patch for side, patch in zip(sides, network.config.patch_size, strict=True))


def feature_shapes(network: WanTransformer3DModel, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Its blocks -> (C, F, H, W) of their tokens."""
    width = network.config.num_attention_heads * network.config.attention_head_dim
    return {f"blocks.{i}": (width, *tokens(network, shape[1:])) for i in range(network.config.num_layers)}


def refusals(parts: Parts) -> dict[str, bool]:
    config = parts["transformer"].config
    return {
        "it has a second network for the less noisy steps (transformer_2, boundary_ratio), as Wan 2.2 A14B "
        "has, and one student is trained here: those with one network, such as Wan 2.1 and Wan 2.2 TI2V 5B, are served":
            parts.get("transformer_2") is not None or parts.get("boundary_ratio") is not None,
        **channel_refusals(config.in_channels, config.out_channels, parts["vae"].config.z_dim),
        "its network reads a picture beside its text": (config.image_dim, config.added_kv_proj_dim) != (None, None),
        **solved_flow_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="wan", denoiser="transformer", targets=TARGETS, video=(480, 832, 81), sigmas=False, noise_dtype=torch.float32,
    **FLOW,
    time=TimeEmbedding("condition_embedder.time_embedder.linear_1", "condition_embedder.timesteps_proj"),
    weights="patch_embedding",                         # loaded in 16 bits, it keeps the embedding of time in float32
    encode=encode, inputs=inputs, feature_shapes=feature_shapes,
    condition_shapes=lambda parts, call: {"text": (call["max_sequence_length"], parts["transformer"].config.text_dim)},
    feature_map=lambda network, out, x_t: out.transpose(1, 2).unflatten(2, tokens(network, x_t.shape[2:])),
    default_features=lambda network: (f"blocks.{network.config.num_layers // 2}",),
    latent_shape=latent_shape, multiple=multiple, codec=lambda parts: video(parts["vae"]),
    prompts=Prompts(gives="frames"), refusals=refusals)
