"""Wan 2.1, and Wan 2.2 with one network: WanTransformer3DModel, a rectified flow on the normalised latents of an AutoencoderKLWan.

Samples are videos: a state is (B, C, F, H, W). The pipeline of Wan 2.2 5B tells its network a time for every token, which in
text to video is one and the same for all: told it once a sample, the network computes the same, and keeps less.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from ...diffusion.contracts import Condition
from ...diffusion.schedule import RectifiedFlow
from ...errors import RequestError
from ..codecs import video
from ..extra_embedding import TimeEmbedding
from ..stock import Prompts
from . import Family, Parts, Size, latent_sides, solved_flow_refusals

if TYPE_CHECKING:
    from ..teacher import Teacher

# Attention and feed-forward layers are what the published few-step LoRAs of Wan adapt; beside them the way in of time.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "condition_embedder.time_proj")


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """text (B, L, D), zeros after a prompt's end, which the network attends to. null: the encoding of "", as the stock pipeline subtracts it."""
    text, _ = teacher.loaded.encode_prompt(prompts, do_classifier_free_guidance=False, device=teacher.device,
                                           max_sequence_length=teacher.asked["max_sequence_length"])
    return Condition(text=text)


def inputs(network: WanTransformer3DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    if cond.text is None:
        raise ValueError("this network reads a text: pass a condition from teacher.encode(prompts)")
    return {"hidden_states": x_t, "timestep": timestep, "encoder_hidden_states": cond.text.to(x_t), "return_dict": False}


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    vae, (_, *patch) = parts["vae"].config, parts["transformer"].config.patch_size
    pixels, each = vae.scale_factor_spatial, vae.scale_factor_temporal
    height, width, frames = size
    if frames % each != 1:
        raise RequestError(f"its videos have a multiple of {each} frames and one, such as {each + 1} or {20 * each + 1}; found {frames}")
    sides = latent_sides((height, width), (height, width), pixels, max(16, pixels * max(patch)))
    return parts["transformer"].config.in_channels, (frames - 1) // each + 1, *sides


def feature_shapes(network: WanTransformer3DModel, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Its blocks -> (C, F, H, W) of their tokens."""
    config = network.config
    sides = (side // patch for side, patch in zip(shape[1:], config.patch_size, strict=True))
    return dict.fromkeys((f"blocks.{i}" for i in range(config.num_layers)), (config.num_attention_heads * config.attention_head_dim, *sides))


def feature_map(network: WanTransformer3DModel, tokens: Tensor, x_t: Tensor) -> Tensor:
    """A block's tokens (B, N, D), frame by frame and row by row, as a map (B, D, F, H, W)."""
    sides = [side // patch for side, patch in zip(x_t.shape[2:], network.config.patch_size, strict=True)]
    return tokens.transpose(1, 2).unflatten(2, sides)


def refusals(parts: Parts) -> dict[str, bool]:
    config, vae = parts["transformer"].config, parts["vae"].config
    return {
        "it has a second network for the less noisy steps (transformer_2, boundary_ratio), as Wan 2.2 A14B has, and one student is trained here: "
        "those with one network, such as Wan 2.1 and Wan 2.2 TI2V 5B, are served":
            parts.get("transformer_2") is not None or parts.get("boundary_ratio") is not None,
        f"its network reads {config.in_channels} channels and its latents have {vae.z_dim}": config.in_channels != vae.z_dim,
        f"its network gives {config.out_channels} channels for {config.in_channels}": config.out_channels != config.in_channels,
        "its network reads a picture beside its text": config.image_dim is not None or config.added_kv_proj_dim is not None,
        **solved_flow_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="wan", denoiser="transformer", targets=TARGETS, video=(480, 832, 81), noise_dtype=torch.float32, sigmas=False,
    schedule=lambda scheduler: RectifiedFlow(),
    kind=lambda scheduler: "velocity", timestep=lambda t, scheduler: t * scheduler.config.num_train_timesteps,
    time=TimeEmbedding("condition_embedder.time_embedder.linear_1", "condition_embedder.timesteps_proj"),
    weights="patch_embedding",                         # time and its norms stay float32 where the network is loaded in 16 bits
    encode=encode, condition_shapes=lambda parts, call: {"text": (call["max_sequence_length"], parts["transformer"].config.text_dim)},
    inputs=inputs, feature_shapes=feature_shapes, feature_map=feature_map,
    default_features=lambda network: (f"blocks.{network.config.num_layers // 2}",),
    latent_shape=latent_shape, codec=lambda parts: video(parts["vae"]), prompts=Prompts(gives="frames"), refusals=refusals)
