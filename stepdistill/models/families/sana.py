"""Sana: SanaTransformer2DModel, a rectified flow on the latents of an AutoencoderDC, which has no posterior."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import SanaTransformer2DModel
from torch import Tensor

from ...diffusion.contracts import Condition
from ..codecs import Plain
from ..extra_embedding import TimeEmbedding
from . import Family, Parts, Size, sides
from .shared import FLOW, ONE_STREAM, latent_sides, masked_text, solved_flow_refusals, variance_refusals

if TYPE_CHECKING:
    from ..teacher import Teacher

# Attention, the pointwise convolutions that are its feed-forward layer, and the way in of time. The convolution between
# them is by channel.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point", "time_embed.linear")


def pixels(parts: Parts) -> int:
    """Of a side of one latent."""
    return 2 ** (len(parts["vae"].config.encoder_block_out_channels) - 1)


def call(parts: Parts, size: Size) -> dict[str, Any]:
    """A stock call takes 1024 pixels unless told otherwise, and draws the nearest of a table of sizes, which it then
    scales."""
    own = parts["transformer"].config.sample_size * pixels(parts)
    return {**sides(parts, size or (own, own)), "use_resolution_binning": False}


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """text (B, L, D), mask (B, L). A stock call puts an instruction before its prompts, and none before what it
    subtracts."""
    given = {name: teacher.asked[name] for name in ("clean_caption", "max_sequence_length",
                                                    "complex_human_instruction")}
    if null:
        given["complex_human_instruction"] = None
    text, mask, _, _ = teacher.loaded.encode_prompt(prompts, do_classifier_free_guidance=False,
                                                    device=teacher.device, **given)
    return Condition(text=text, mask=mask)


def inputs(network: SanaTransformer2DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    return {"hidden_states": x_t, "timestep": timestep * network.config.timestep_scale,
            "encoder_hidden_states": cond.text.to(x_t),
            "encoder_attention_mask": cond.mask, "return_dict": False}


def multiple(parts: Parts) -> int:
    return max(32, pixels(parts) * parts["transformer"].config.patch_size)


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    config = parts["transformer"].config
    return config.in_channels, *latent_sides(size, config.sample_size, pixels(parts), multiple(parts))


def refusals(parts: Parts) -> dict[str, bool]:
    return {
        **variance_refusals(parts),
        "its network reads a guidance scale, which its pipeline "
        "does not say": parts["transformer"].config.guidance_embeds,
        **solved_flow_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="sana", denoiser="transformer", targets=TARGETS, seeded_steps=True, **FLOW,
    time=TimeEmbedding("time_embed.emb.timestep_embedder.linear_1", "time_embed.emb.time_proj",
                       scale=lambda network: network.config.timestep_scale),
    encode=encode, condition_shapes=masked_text("caption_channels"), inputs=inputs, call=call,
    latent_shape=latent_shape, multiple=multiple,
    codec=lambda parts: Plain(parts["vae"], parts["vae"].config.scaling_factor), refusals=refusals, **ONE_STREAM)
