"""How ComfyUI's core names the layers of a transformer in a LoRA's file, as far as diffusers reads the same file.

Facts of ComfyUI (comfy/lora.py, `model_lora_keys_unet`, and the tables of comfy/utils.py): it takes diffusers' own
names after `transformer.` for Stable Diffusion 3, Flux, Z-Image and Qwen-Image, and peft's after `base_model.model.`
for PixArt. Of Wan it takes the names of the first release, after `diffusion_model.`; of Flux.2 too, for what lies
outside of the blocks, or without points after `lora_unet_`, which diffusers passes over. Without an `alpha` it scales a
layer by 1.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .student import Lora


def of_diffusers(module: str) -> str:
    return f"transformer.{module}"


WAN = ((r"\.attn1\.to_([qkv])$", r".self_attn.\1"), (r"\.attn2\.to_([qkv])$", r".cross_attn.\1"),
       (r"\.attn1\.to_out\.0$", ".self_attn.o"),
       (r"\.attn2\.to_out\.0$", ".cross_attn.o"), (r"\.ffn\.net\.0\.proj$", ".ffn.0"), (r"\.ffn\.net\.2$", ".ffn.2"),
       (r"^condition_embedder\.time_proj$", "time_projection.1"), (r"^condition_embedder\.time_embedder\.linear_1$",
                                                                   "time_embedding.0"))
FLUX2 = {"double_stream_modulation_img.linear": "double_stream_modulation_img_lin",
         "double_stream_modulation_txt.linear": "double_stream_modulation_txt_lin",
         "single_stream_modulation.linear": "single_stream_modulation_lin",
         "time_guidance_embed.timestep_embedder.linear_1": "time_in_in_layer"}


def of_wan(module: str) -> str:
    """As Wan's first release names it. ValueError for a layer that is not known there."""
    for own, theirs in WAN:
        named, count = re.subn(own, theirs, module)
        if count:
            return f"diffusion_model.{named}"
    raise ValueError(f"ComfyUI has no name for the layer {module} of Wan")


def none_beside(module: str) -> str | None:
    return None


def beside_flux2(module: str) -> str | None:
    name = FLUX2.get(module)
    return None if name is None else f"lora_unet_{name}"


@dataclass(frozen=True)
class Names:
    """key: of a layer, by its name in diffusers' network, as both read it. beside: another of the same layer, for
    ComfyUI alone; None where it reads the first."""

    key: Callable[[str], str] = of_diffusers
    beside: Callable[[str], str | None] = none_beside


NAMES: Mapping[str, Names] = {"sd3": Names(), "flux": Names(), "flux2": Names(beside=beside_flux2), "z_image": Names(),
                              "qwen_image": Names(),
                              "wan": Names(of_wan), "pixart": Names(lambda module: f"base_model.model.{module}")}


def named(lora: Lora, names: Names) -> dict[str, Tensor]:
    """The file of a LoRA whose layers are scaled by 1."""
    state: dict[str, Tensor] = {}
    for module in lora.modules:
        for key in (names.key(module), names.beside(module)):
            if key is not None:
                state |= {f"{key}.lora_{side}.weight": lora.state[f"{module}.lora_{side}.weight"].clone().contiguous()
                          for side in "AB"}
    return state
