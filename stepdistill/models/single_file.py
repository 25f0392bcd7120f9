"""Checkpoints in one file: of which pipeline they are, by the names of their tensors."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import safe_open

from ..errors import RequestError

NETWORK = "model.diffusion_model."
UNET = tuple(f"{NETWORK}{part}." for part in ("input_blocks", "middle_block", "output_blocks", "out"))
SERVED = "Stable Diffusion 1 and 2 and SDXL are read from one file"
# how the tensors of LoRAs are named, by diffusers and peft, by kohya's scripts, and by those of other adapters
LORAS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".hada_w1_a", ".lokr_w1", ".dora_scale")


def class_of_keys(keys: Sequence[str], file: str) -> str:
    """The class of the pipeline whose checkpoint has tensors of these names. RequestError for any but those of Stable
    Diffusion 1 and 2 and SDXL, whose has a second text encoder."""
    starts = lambda prefix: any(key.startswith(prefix) for key in keys)           # or one of several
    if any(sign in f"{key}." for key in keys for sign in LORAS):
        raise RequestError(f"{file} is a LoRA, which lies on a pipeline: let that be the teacher's base, and name the "
                           "file by loras")
    if starts(f"{NETWORK}joint_blocks."):
        raise RequestError(f"{file} is a Stable Diffusion 3 in one file, which may or may not hold its text encoders: "
                           "give its "
                           "pipeline as a folder or a Hub id, such as stabilityai/stable-diffusion-3-medium-diffusers")
    if not starts(NETWORK):
        raise RequestError(f"{file} holds no whole Stable Diffusion checkpoint: no tensor's name begins with "
                           f"{NETWORK} (the first is {keys[0] if keys else 'missing'}). {SERVED}; give another's "
                           "pipeline as a folder or a Hub id")
    if not starts(UNET) or starts("conditioner.embedders.0.model."):
        first = next(key for key in keys if key.startswith(NETWORK))
        kind = "SDXL's refiner" if starts(UNET) else f"a checkpoint of another network, whose first tensor is {first}"
        raise RequestError(f"{file} is {kind}. {SERVED}: give its pipeline as a folder or a Hub id")
    return "StableDiffusionXLPipeline" if starts("conditioner.embedders.1.") else "StableDiffusionPipeline"


def published(file: Path) -> str:
    """The Hub repository whose configs diffusers takes for a checkpoint in one file."""
    with safe_open(file, framework="pt") as tensors:
        shapes = {key: torch.empty(tensors.get_slice(key).get_shape(), device="meta") for key in tensors.keys()}
    return fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
