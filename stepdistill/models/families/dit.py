"""DiT: DiTTransformer2DModel, which is told a class of ImageNet, on the latents of an AutoencoderKL."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from ...diffusion.contracts import Condition
from ...errors import RequestError
from ..codecs import scaled
from ..extra_embedding import TimeEmbedding
from ..stock import Prompts
from . import Family, Parts, Size
from .shared import (
    DISCRETE,
    ONE_STREAM,
    class_number,
    codec_pixels,
    discrete_refusals,
    one_size,
    sides_of,
    variance_refusals,
)

if TYPE_CHECKING:
    from ..teacher import Teacher

NULL = 1000                                        # the class that a stock call subtracts, whatever its network
# Attention, feed-forward and the way in of time and class, of each block and of the last layer.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "proj_out_1")


def read(pipeline: DiTPipeline, prompt: str) -> int:
    """The class of "class 3", or of a name among the pipeline's labels; of "" the null class. RequestError for any
    other prompt."""
    if not prompt.strip():
        return NULL
    number = class_number(prompt)
    found = pipeline.labels.get(prompt.strip()) if number is None else number
    if found is None or found >= NULL:
        some = ", ".join(list(pipeline.labels)[:3]) or "this pipeline has none"
        raise RequestError(f"a prompt of DiT names a class, as class 0 to class {NULL - 1} or by a label of the "
                           f"pipeline ({some}); found {prompt!r}")
    return found


def index(pipeline: DiTPipeline) -> dict[str, Any]:
    """The names of classes. It reads them, and writes none."""
    names: dict[str, list[str]] = {}
    for label, number in pipeline.labels.items():
        names.setdefault(str(number), []).append(label)
    return {"id2label": {number: ", ".join(labels) for number, labels in names.items()}} if names else {}


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """label (B,)."""
    return Condition(label=torch.tensor([read(teacher.loaded, prompt) for prompt in prompts], device=teacher.device))


def inputs(network: DiTTransformer2DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    return {"hidden_states": x_t, "timestep": timestep, "class_labels": cond.label, "return_dict": False}


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    config = parts["transformer"].config
    sides = sides_of(config.sample_size)
    one_size(size, tuple(side * codec_pixels(parts["vae"]) for side in sides))
    return config.in_channels, *sides


def refusals(parts: Parts) -> dict[str, bool]:
    network = parts["transformer"].config
    return {
        **variance_refusals(parts),
        f"its network knows {network.num_embeds_ada_norm} classes, and its pipeline subtracts "
        f"class {NULL}": network.num_embeds_ada_norm != NULL,
        **discrete_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="dit", denoiser="transformer", targets=TARGETS,
    # each block has sinusoids of its own
    time=TimeEmbedding("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1", None),
    reads=lambda network: "classes", prompts=Prompts("class_labels", read, "np"), index=index,
    call=lambda parts, size: {},
    encode=encode, condition_shapes=lambda parts, call: {"label": ()}, inputs=inputs,
    latent_shape=latent_shape, codec=lambda parts: scaled(parts["vae"]), refusals=refusals, **DISCRETE, **ONE_STREAM)
