"""Stable Diffusion 1.x and 2.x, and SDXL: UNet2DConditionModel on the latents of an AutoencoderKL."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from ...diffusion.contracts import Condition
from ...diffusion.schedule import moved
from ..codecs import normalised, scaled
from ..extra_embedding import WIDTH, StockInput, TimeEmbedding, embedding
from ..stock import Guidance
from . import Family, Parts, Size
from .shared import DISCRETE, UNET, channel_refusals, clip_skip, codec_pixels, discrete_refusals, latent_sides, whole

if TYPE_CHECKING:
    from ..teacher import Teacher

# The layers that LCM-LoRA adapts (arXiv:2311.05556): attention, feed-forward, convolutions and the way in of time.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
           "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


def multiple(parts: Parts) -> int:
    return max(8, codec_pixels(parts["vae"]))


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    config, pixels = parts["unet"].config, codec_pixels(parts["vae"])
    return config.in_channels, *latent_sides(size, config.sample_size, pixels, multiple(parts))


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """text (B, L, D); SDXL adds pooled (B, D) and time_ids (B, 6). null: the encoding of "", or zeros where an SDXL
    pipeline says so; of a negative prompt where there is one, which clip_skip does not concern."""
    nothing = teacher.source.negative_prompt is None and prompts == [teacher.family.null_prompt]
    text, *pooled = teacher.loaded.encode_prompt(
        prompts, device=teacher.device, num_images_per_prompt=1, do_classifier_free_guidance=null,
        negative_prompt=None if nothing else prompts, clip_skip=clip_skip(teacher))[null::2]
    if not pooled:
        return Condition(text=text)
    return Condition(text=text, pooled=pooled[0], time_ids=whole(teacher, text))


def condition_shapes(parts: Parts, call: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    config, length = parts["unet"].config, parts["text_encoder"].config.max_position_embeddings
    text = {"text": (length, config.cross_attention_dim)}
    if config.addition_embed_type != "text_time":
        return text
    return text | {"pooled": (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,),
                   "time_ids": (6,)}


def inputs(network: UNet2DConditionModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    w = None if cond.w is None else moved(embedding("w", cond.w).to(x_t.dtype), x_t.device)
    added = None if cond.pooled is None else {"text_embeds": cond.pooled.to(x_t), "time_ids": cond.time_ids.to(x_t)}
    return {"sample": x_t, "timestep": timestep, "encoder_hidden_states": cond.text.to(x_t), "timestep_cond": w,
            "added_cond_kwargs": added, "return_dict": False}


def refusals(parts: Parts) -> dict[str, bool]:
    unet, vae = parts["unet"].config, parts["vae"].config
    return {
        **channel_refusals(unet.in_channels, unet.out_channels, vae.latent_channels),
        "its network reads a guidance scale: it is a student already": unet.time_cond_proj_dim is not None,
        "its network reads classes or images": unet.class_embed_type is not None or unet.num_class_embeds is not None
            or unet.encoder_hid_dim_type is not None or unet.addition_embed_type not in (None, "text_time"),
        "its latents are shifted by a mean, which its pipeline leaves alone": vae.latents_mean is not None
        and "text_encoder_2" not in parts,
        **discrete_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="unet2d_condition", denoiser="unet", targets=TARGETS, seeded_steps=True, **DISCRETE, **UNET,
    guidance=lambda network: Guidance(embedded="guidance_scale",
                                      within=network.config.time_cond_proj_dim is not None),
    time=TimeEmbedding("time_embedding.linear_1", "time_proj",
                       {"w": StockInput("time_embedding.cond_proj", WIDTH, {"time_cond_proj_dim": WIDTH})}),
    encode=encode, condition_shapes=condition_shapes, inputs=inputs, latent_shape=latent_shape, multiple=multiple,
    # SDXL is told a picture's own size, where it was cropped, and the size that it has: arXiv:2307.01952, section 2.2
    sized=lambda rows: rows,
    codec=lambda parts: (scaled if parts["vae"].config.latents_mean is None else normalised)(parts["vae"]),
    refusals=refusals,
    # The safety checker stays where it is: it is no part of what is distilled.
    arguments=lambda cls: {"safety_checker": None, "requires_safety_checker": False}
    if cls == "StableDiffusionPipeline" else {})
