"""Z-Image: ZImageTransformer2DModel, a rectified flow on the shifted latents of an AutoencoderKL.

It is told 1 - t, predicts the way towards the data, and takes lists: of pictures with a frame axis, and of captions
without padding.
"""
from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from ...diffusion.contracts import Condition
from ..codecs import shifted
from ..extra_embedding import TimeEmbedding
from ..stock import Guidance
from ..tokens import PATCH, grid
from . import Family, Parts, Size
from .shared import FLOW, channel_refusals, codec_pixels, flow_refusals, latent_sides, masked_text, shift_refusals

if TYPE_CHECKING:
    from ..teacher import Teacher

SIDE = 1024                                        # pixels on a picture's side in a call
# The attention layers are those of diffusers' train_dreambooth_lora_z_image.py; the feed-forward layers and the way in
# of time, here the modulations, are what LCM-LoRA adapts in a UNet.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
           "adaLN_modulation.0", "adaLN_modulation.1")


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """text (B, L, D), zeros where mask (B, L) int64 is 0. null: the encoding of ""."""
    length = teacher.asked["max_sequence_length"]
    captions, _ = teacher.loaded.encode_prompt(prompts, teacher.device, False, max_sequence_length=length)
    text = torch.stack([F.pad(caption, (0, 0, 0, length - len(caption))) for caption in captions])
    own = torch.tensor([[len(caption)] for caption in captions], device=text.device)
    return Condition(text=text, mask=(torch.arange(length, device=text.device) < own).long())


def inputs(network: ZImageTransformer2DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    # On the meta device there are no values, and the longest captions stand for all.
    lengths = [cond.text.shape[1]] * len(x_t) if cond.mask.is_meta else cond.mask.sum(1).tolist()
    captions = [row[:length] for row, length in zip(cond.text.to(x_t), lengths, strict=True)]
    return {"x": list(x_t[:, :, None].unbind()), "t": timestep, "cap_feats": captions, "return_dict": False}


def feature_map(network: ZImageTransformer2DModel, output: Tensor, x_t: Tensor) -> Tensor:
    """What a block returned, picture tokens before text tokens (B, N, D), as a map (B, D, H, W)."""
    return grid(output[:, :prod(x_t.shape[2:]) // PATCH**2], x_t.shape)


def feature_shapes(network: ZImageTransformer2DModel, shape: tuple[int, ...]) -> dict[str, tuple[int, int, int]]:
    """The blocks that read pictures and text together -> (C, H, W) of their picture tokens."""
    size = network.config.dim, *(side // PATCH for side in shape[1:])
    return {f"layers.{i}": size for i in range(network.config.n_layers)}


def multiple(parts: Parts) -> int:
    return PATCH * codec_pixels(parts["vae"])


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    pixels = codec_pixels(parts["vae"])
    return parts["transformer"].config.in_channels, *latent_sides(size, SIDE // pixels, pixels, multiple(parts))


def refusals(parts: Parts) -> dict[str, bool]:
    network = parts["transformer"].config
    return {
        **channel_refusals(network.in_channels, None, parts["vae"].config.latent_channels),
        "its network is told pictures, too (siglip_feat_dim)": network.siglip_feat_dim is not None,
        **shift_refusals(parts["vae"]),
        **flow_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="z_image", denoiser="transformer", targets=TARGETS,
    **FLOW | {"timestep": lambda t, scheduler: 1 - t},
    time=TimeEmbedding("t_embedder.mlp.0", None),                  # a static method makes the sinusoids
    guidance=lambda network: Guidance(offset=1.0), encode=encode, condition_shapes=masked_text("cap_feat_dim"),
    inputs=inputs, output=lambda found, x_t: -torch.stack(found[0])[:, :, 0],
    feature_shapes=feature_shapes, feature_map=feature_map,
    default_features=lambda network: (f"layers.{network.config.n_layers // 2}",),              # the block in the middle
    latent_shape=latent_shape, multiple=multiple, codec=lambda parts: shifted(parts["vae"]), refusals=refusals)
