"""FLUX.1, dev and schnell: FluxTransformer2DModel, a rectified flow on the shifted latents of an AutoencoderKL, in
tokens of 2 x 2.

A network with guidance_embeds reads its scale beside the time; one without is guided by two calls against a negative
prompt, "". Text is padded to max_sequence_length, and the padding is attended: a stock call's length is part of the
condition.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ...diffusion.contracts import Condition
from ...diffusion.schedule import moved
from ..codecs import shifted
from ..extra_embedding import TimeEmbedding
from ..stock import Guidance
from ..tokens import PATCH, grid, packed, packed_noise, unpacked
from . import Family, Parts, Size
from .shared import FLOW, codec_pixels, flow_refusals, latent_sides, shift_refusals, stream_blocks

if TYPE_CHECKING:
    from ..teacher import Teacher

TOKENS = 512                                       # max_sequence_length of a stock call
SIDE = 128                                         # latents of a side of a stock call's picture
# The layers of diffusers' train_dreambooth_lora_flux.py, those of the single blocks, and the way in of time: the
# modulations.
TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
           "attn.add_v_proj",
           "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
           "proj_mlp", "proj_out",
           "norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """text (B, L, D), T5's tokens; pooled (B, P), CLIP's. null: the encoding of ""."""
    text, pooled, _ = teacher.loaded.encode_prompt(prompts, device=teacher.device,
                                                   max_sequence_length=teacher.call.get("max_sequence_length", TOKENS))
    return Condition(text=text, pooled=pooled)


def condition_shapes(parts: Parts, call: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    config = parts["transformer"].config
    return {"text": (call.get("max_sequence_length", TOKENS), config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,)}


def inputs(network: FluxTransformer2DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    """The network multiplies the time and the scale by 1000 again, in its own dtype."""
    scale = moved(cond.w.float(), x_t.device) if network.config.guidance_embeds else None
    return {"hidden_states": packed(x_t), "timestep": timestep / 1000, "guidance": scale,
            "encoder_hidden_states": cond.text.to(x_t), "pooled_projections": cond.pooled.to(x_t),
            "txt_ids": x_t.new_zeros(cond.text.shape[1], 3),
            "img_ids": places(x_t), "return_dict": False}


def places(x_t: Tensor) -> Tensor:
    """0, row and column of each token, (N, 3)."""
    rows, columns = (torch.arange(side // PATCH, device=x_t.device) for side in x_t.shape[2:])
    return torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns).to(x_t.dtype)


def feature_shapes(network: FluxTransformer2DModel, shape: tuple[int, ...]) -> dict[str, tuple[int, int, int]]:
    """Its blocks -> (C, H, W) of their picture tokens."""
    return dict.fromkeys(stream_blocks(network), (network.inner_dim, *[side // PATCH for side in shape[1:]]))


def multiple(parts: Parts) -> int:
    return codec_pixels(parts["vae"]) * PATCH


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    pixels = codec_pixels(parts["vae"])
    return (parts["transformer"].config.in_channels // PATCH ** 2,
            *latent_sides(size, SIDE, pixels, multiple(parts)))


def guidance(network: FluxTransformer2DModel) -> Guidance:
    embeds = network.config.guidance_embeds
    return Guidance("true_cfg_scale", beside={"negative_prompt": ""}, embedded="guidance_scale" if embeds else None,
                    within=embeds)


def refusals(parts: Parts) -> dict[str, bool]:
    network, vae = parts["transformer"].config, parts["vae"].config
    return {
        f"its network reads tokens of {network.in_channels} numbers, and those of its latents have "
        f"{PATCH ** 2 * vae.latent_channels}":
            network.in_channels != PATCH ** 2 * vae.latent_channels,
        f"its network gives {network.out_channels} numbers for {network.in_channels}":
            network.out_channels not in (None, network.in_channels) or network.patch_size != 1,
        **shift_refusals(parts["vae"]),
        **flow_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="flux", denoiser="transformer", targets=TARGETS, **FLOW,
    timestep_dtype=None,                           # a stock call rounds it to latents' dtype
    time=TimeEmbedding("time_text_embed.timestep_embedder.linear_1", "time_text_embed.time_proj"),
    encode=encode, condition_shapes=condition_shapes, inputs=inputs,
    output=lambda found, x_t: unpacked(found[0], x_t.shape), feature_shapes=feature_shapes,
    default_features=lambda network: stream_blocks(network, middle=True),
    # a block returns its text tokens and its picture tokens
    feature_map=lambda network, output, x_t: grid(output[1], x_t.shape),
    latent_shape=latent_shape, multiple=multiple, codec=lambda parts: shifted(parts["vae"]), guidance=guidance,
    step_noise=packed_noise, refusals=refusals)
