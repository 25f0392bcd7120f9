"""Qwen-Image: QwenImageTransformer2DModel, a rectified flow on the normalised latents of an AutoencoderKLQwenImage.

The network reads tokens of 2 x 2 latents. Guidance is not linear: each token gets back the length that it has with the
condition alone.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ...diffusion.contracts import Condition
from ...diffusion.prediction import linear
from ..codecs import framed
from ..extra_embedding import TimeEmbedding
from ..stock import Guidance
from ..tokens import PATCH, grid, packed, packed_noise, unpacked
from . import Family, Parts, Size, fresh
from .shared import FLOW, flow_refusals, latent_sides, masked_text, middle_block

if TYPE_CHECKING:
    from ..teacher import Teacher

SIDE = 128                                         # latents on a picture's side in a call that names no size
# to_q to to_out.0 are those of diffusers' train_dreambooth_lora_qwen_image.py; the text's attention, the feed-forward
# layers and the way in of time, here the modulations, are what LCM-LoRA adapts in a UNet. No gradient ever reaches
# add_q_proj, to_add_out and txt_mlp of the last block, whose text is not read any more.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
           "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1",
           "norm_out.linear")


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """text (B, L, D), zeros where mask (B, L) int64 is 0. null: the encoding of " "."""
    length = teacher.asked["max_sequence_length"]
    text, mask = teacher.loaded.encode_prompt(prompts, teacher.device, max_sequence_length=length)
    mask = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device) if mask is None else mask
    rest = length - text.shape[1]
    return Condition(text=F.pad(text, (0, 0, 0, rest)), mask=F.pad(mask, (0, rest)))


def inputs(network: QwenImageTransformer2DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    """As in a stock call, which rounds 1000 t to the dtype of latents."""
    text, mask = trimmed(cond.text.to(x_t), cond.mask)
    height, width = (side // PATCH for side in x_t.shape[2:])
    return {"hidden_states": packed(x_t), "timestep": (1000 * timestep).to(x_t.dtype) / 1000,
            "encoder_hidden_states": text, "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, height, width)]] * len(x_t), "return_dict": False}


def trimmed(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Without the padding that is all rows', and without a mask where none is left."""
    if mask.is_meta:                               # no values, so the longest text stands for all
        return text, None
    lengths = mask.sum(1).tolist()
    longest = max(lengths)
    return text[:, :longest], None if min(lengths) == longest else mask[:, :longest]


def combine(given: Tensor, without: Tensor, w: Tensor) -> Tensor:
    """Linear guidance, after which each token has the length that it has with the condition alone."""
    mixed = packed(linear(given, without, w))
    lengths = packed(given).norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
    return unpacked(mixed * lengths, given.shape)


def made(network: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Its positions are no buffers, so that the new network shares them: `to_empty` would leave them without values."""
    new = fresh(network, config)
    new.pos_embed = network.pos_embed
    return new


def codec_side(parts: Parts) -> int:
    """Pixels of a side of one latent."""
    return 2 ** len(parts["vae"].config.temperal_downsample)


def multiple(parts: Parts) -> int:
    return PATCH * codec_side(parts)


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    channels = parts["transformer"].config.in_channels // PATCH**2
    return channels, *latent_sides(size, SIDE, codec_side(parts), multiple(parts))


def feature_shapes(network: QwenImageTransformer2DModel, shape: tuple[int, ...]) -> dict[str, tuple[int, int, int]]:
    """Its blocks -> (C, H, W) of their picture tokens."""
    size = network.inner_dim, *(side // PATCH for side in shape[1:])
    return {f"transformer_blocks.{i}": size for i in range(network.config.num_layers)}


def refusals(parts: Parts) -> dict[str, bool]:
    network, vae = parts["transformer"].config, parts["vae"].config
    token = PATCH**2 * vae.z_dim
    return {
        f"its network reads tokens of {network.in_channels} numbers, and those of its latents have {token}":
            network.in_channels != token,
        f"its network gives tokens of {network.patch_size**2 * network.out_channels} numbers for {network.in_channels}":
            network.patch_size**2 * network.out_channels != network.in_channels,
        "its network has guidance_embeds, with which its class cannot be called": network.guidance_embeds,
        "its network is one that edits pictures, or draws them in layers":
            network.zero_cond_t or network.use_additional_t_cond or network.use_layer3d_rope,
        f"its codec gives {vae.input_channels} channels of a picture": vae.input_channels != 3,
        **flow_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="qwen_image", denoiser="transformer", targets=TARGETS,
    **FLOW | {"timestep": lambda t, scheduler: t},
    time=TimeEmbedding("time_text_embed.timestep_embedder.linear_1", "time_text_embed.time_proj"),
    guidance=lambda network: Guidance("true_cfg_scale", beside={"negative_prompt": " "}), null_prompt=" ",
    combine=combine, step_noise=packed_noise,
    encode=encode, condition_shapes=masked_text("joint_attention_dim"), inputs=inputs, fresh=made,
    output=lambda found, x_t: unpacked(found[0], x_t.shape), feature_shapes=feature_shapes,
    feature_map=lambda network, output, x_t: grid(output[1], x_t.shape),       # a block gives text, then picture tokens
    default_features=middle_block,
    latent_shape=latent_shape, multiple=multiple, codec=lambda parts: framed(parts["vae"]), refusals=refusals,
    unserved={"train.compile": "texts of each length would be compiled anew: leave it off"})
