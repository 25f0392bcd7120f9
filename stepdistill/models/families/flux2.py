"""FLUX.2, dev and undistilled klein: Flux2Transformer2DModel, a rectified flow on the latents of an AutoencoderKLFlux2,
folded by 2 x 2.

Dev's network reads its guidance scale beside the time; klein is guided by two calls against "". Text is layers of a
Mistral3 or a Qwen3, padded to max_sequence_length, and the padding is attended: a stock call's length is part of the
condition.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor

from ...diffusion.contracts import Condition
from ...diffusion.schedule import moved
from ..codecs import folded
from ..extra_embedding import TimeEmbedding
from ..stock import Guidance
from . import Family, Parts, Size
from .shared import FLOW, codec_pixels, flow_refusals, latent_sides, stream_blocks

if TYPE_CHECKING:
    from ..teacher import Teacher

SIDE = 64                                          # latents on a side of a stock call's picture
PATCH = 2                                          # the codec's latents on a side of one of these
# The layers of diffusers' train_dreambooth_lora_flux2_klein.py, those of the text's stream and of feed-forward, and the
# way in of time: the modulations, which all blocks share.
TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
           "attn.add_v_proj",
           "attn.to_add_out", "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",
           "attn.to_qkv_mlp_proj",
           "attn.to_out", "double_stream_modulation_img.linear", "double_stream_modulation_txt.linear",
           "single_stream_modulation.linear", "norm_out.linear")


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """text (B, L, D), the layers one beside the other. null: the encoding of "", as the stock pipeline subtracts it."""
    given = {name: teacher.asked[name] for name in ("max_sequence_length", "text_encoder_out_layers")}
    text, _ = teacher.loaded.encode_prompt(prompts, device=teacher.device, **given)
    return Condition(text=text)


def condition_shapes(parts: Parts, call: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {"text": (call["max_sequence_length"], parts["transformer"].config.joint_attention_dim)}


def inputs(network: Flux2Transformer2DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    """The network multiplies the time and the scale by 1000 again, in its own dtype."""
    height, width = x_t.shape[2:]
    scale = moved(cond.w.float(), x_t.device) if network.config.guidance_embeds else None
    return {"hidden_states": x_t.flatten(2).transpose(1, 2), "timestep": timestep / 1000,
            "encoder_hidden_states": cond.text.to(x_t), "guidance": scale,
            "txt_ids": places(x_t, 1, 1, cond.text.shape[1]), "img_ids": places(x_t, height, width, 1),
            "return_dict": False}


def places(x_t: Tensor, height: int, width: int, length: int) -> Tensor:
    """0, row, column and place in the text of each token, (N, 4)."""
    return torch.cartesian_prod(*[torch.arange(count, device=x_t.device) for count in (1, height, width, length)])


def grid(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The last tokens (B, N, D), those of a picture of this shape, as a map (B, D, H, W)."""
    height, width = shape[-2:]
    return tokens[:, -height * width:].transpose(1, 2).unflatten(2, (height, width))


def step_noise(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = shape
    return grid(torch.randn(batch, height * width, channels, generator=generator, dtype=dtype, device=generator.device),
                shape)


def multiple(parts: Parts) -> int:
    return codec_pixels(parts["vae"]) * PATCH


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    return parts["transformer"].config.in_channels, *latent_sides(size, SIDE, multiple(parts), multiple(parts))


def guidance(network: Flux2Transformer2DModel) -> Guidance:
    embeds = network.config.guidance_embeds
    return Guidance(embedded="guidance_scale" if embeds else None, within=embeds)


def refusals(parts: Parts) -> dict[str, bool]:
    network, channels = parts["transformer"].config, PATCH ** 2 * parts["vae"].config.latent_channels
    klein = "is_distilled" in parts                    # what its class alone says
    return {
        "it is distilled to a few steps already, and ignores guidance: take the "
        "undistilled one": parts.get("is_distilled", False),
        "its network reads a guidance scale, of which this pipeline says nothing": klein and network.guidance_embeds,
        "its network reads no guidance scale, and this pipeline guides by nothing else":
            not klein and not network.guidance_embeds,
        f"its network reads tokens of {network.in_channels} numbers, and those of its latents have "
        f"{channels}": network.in_channels != channels,
        f"its network gives {network.out_channels} numbers for {network.in_channels}":
            network.out_channels not in (None, network.in_channels) or network.patch_size != 1,
        **flow_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="flux2", denoiser="transformer", targets=TARGETS, **FLOW,
    timestep_dtype=None,                           # a stock call rounds it to latents' dtype
    time=TimeEmbedding("time_guidance_embed.timestep_embedder.linear_1", "time_guidance_embed.time_proj"),
    encode=encode, condition_shapes=condition_shapes, inputs=inputs,
    output=lambda found, x_t: grid(found[0], x_t.shape),
    feature_shapes=lambda network, shape: dict.fromkeys(stream_blocks(network), (network.inner_dim, *shape[1:])),
    default_features=lambda network: stream_blocks(network, middle=True),
    # A block of two streams returns text and picture, one of one stream both in one.
    feature_map=lambda network, output, x_t: grid(output if isinstance(output, Tensor) else output[1], x_t.shape),
    latent_shape=latent_shape, multiple=multiple, codec=lambda parts: folded(parts["vae"]), step_noise=step_noise,
    guidance=guidance, refusals=refusals)
