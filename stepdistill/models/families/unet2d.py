"""UNet2DModel on pixels: DDPM, DDIM, EDM and consistency models, without a prompt or told a class."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from torch import Tensor

from ...diffusion.contracts import Condition
from ...errors import RequestError
from .. import edm
from ..codecs import Points
from ..extra_embedding import TimeEmbedding
from ..stock import Guidance, Prompts
from . import Family, Parts, Size
from .shared import UNET, class_number, one_size, sides_of

if TYPE_CHECKING:
    from ..teacher import Teacher

# As of UNets with text: attention, convolutions and the way in of time.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv",
           "upsamplers.0.conv", "time_emb_proj")
UNGUIDED = ("no call of a pipeline of UNet2DModel guides, and no config says which class would stand for none: "
            "leave it out, or let it be 1")


def called_by(index: Mapping[str, Any], network: Mapping[str, Any]) -> str:
    """Of the two classes ConsistencyModelPipeline alone passes labels on and lets a scheduler scale. With one of DDPM's
    kind it calls all else alike."""
    plain = network.get("num_class_embeds") is None and not edm.by_edm(index["scheduler"][1])
    return index["_class_name"] if plain else "ConsistencyModelPipeline"


def read(pipeline: DiffusionPipeline, prompt: str) -> int | None:
    """The class of "class 3"; None of "" where the network knows no classes. RequestError for any other prompt."""
    classes, number = pipeline.unet.config.num_class_embeds, class_number(prompt)
    if classes is None and prompt.strip():
        raise RequestError(f"a network without classes is asked for nothing, by the prompt \"\"; found {prompt!r}: "
                           "leave prompts out, or let data.prompts be none")
    if classes is not None and (number is None or number >= classes):
        raise RequestError(f"a prompt of this pipeline names a class, as class 0 to class {classes - 1}; found "
                           f"{prompt!r}")
    return number


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """label (B,); 0 where there is no prompt, which nothing is drawn from, and of networks that know no classes."""
    labels = [read(teacher.loaded, prompt) or 0 if prompt else 0 for prompt in prompts]
    return Condition(label=torch.tensor(labels, device=teacher.device))


def inputs(network: UNet2DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    labels = None if network.config.num_class_embeds is None else cond.label
    return {"sample": x_t, "timestep": timestep, "class_labels": labels, "return_dict": False}


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    config = parts["unet"].config
    return config.in_channels, *one_size(size, sides_of(config.sample_size))


def refusals(parts: Parts) -> dict[str, bool]:
    network = parts["unet"].config
    return {
        f"its pictures have {network.in_channels} channels, and those of 3 are served": network.in_channels != 3,
        f"its network gives {network.out_channels} channels for {network.in_channels}":
            network.out_channels != network.in_channels,
        "its network's config says no sample_size": network.sample_size is None,
        f"its network embeds its time as {network.time_embedding_type}": network.time_embedding_type != "positional",
        f"its network reads classes as {network.class_embed_type}": network.class_embed_type is not None,
        "its pictures should be squares, as ConsistencyModelPipeline draws them, which alone calls it":
            not isinstance(network.sample_size, int)
            and (network.num_class_embeds is not None or edm.by_edm(type(parts["scheduler"]).__name__)),
        **edm.refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="unet2d", denoiser="unet", targets=TARGETS, seeded_steps=True, guidance=lambda network: Guidance(None),
    called_by=called_by, time=TimeEmbedding("time_embedding.linear_1", "time_proj"),
    prompts=Prompts("class_labels", read, count="batch_size", any=lambda pipeline:
                    "" if pipeline.unet.config.num_class_embeds is None else "class 0"),
    reads=lambda network: "nothing" if network.config.num_class_embeds is None else "classes",
    encode=encode, condition_shapes=lambda parts, call: {"label": ()}, inputs=inputs, latent_shape=latent_shape,
    call=lambda parts, size: {}, codec=lambda parts: Points(), refusals=refusals,
    unserved=dict.fromkeys(("guidance", "data.samples.guidance", "data.pairs.guidance"), UNGUIDED),
    **edm.EITHER, **UNET)
