"""UNet2DModel on pixels: DDPM, DDIM, EDM and consistency models, without a prompt or told a class."""
from __future__ import annotations

import re
from collections.abc import Mapping
from math import atan
from typing import TYPE_CHECKING, Any

import torch
from diffusers import CMStochasticIterativeScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel
from torch import Tensor

from ...diffusion.consistency import SIGMA_DATA
from ...diffusion.contracts import Condition
from ...diffusion.schedule import Schedule, TrigFlow, VariancePreserving
from ...errors import RequestError
from ..codecs import Points
from ..extra_embedding import TimeEmbedding
from ..stock import Guidance, Prompts
from . import Family, Parts, Size
from .shared import KINDS, UNET, discrete_refusals, node

if TYPE_CHECKING:
    from ..teacher import Teacher

# As of UNets with text: attention, convolutions and the way in of time.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv",
           "upsamplers.0.conv", "time_emb_proj")
# schedulers by EDM's clock, which scale what the network reads and gives
PRECONDITIONED = ("EDM", "CMStochastic")
UNGUIDED = ("no call of a pipeline of UNet2DModel guides, and no config says which class would stand for none: "
            "leave it out, or let it be 1")


def called_by(index: Mapping[str, Any], network: Mapping[str, Any]) -> str:
    """Of the two classes ConsistencyModelPipeline alone passes labels on and lets a scheduler scale. With one of DDPM's
    kind it calls all else alike."""
    plain = network.get("num_class_embeds") is None and not index["scheduler"][1].startswith(PRECONDITIONED)
    return index["_class_name"] if plain else "ConsistencyModelPipeline"


def by_edm(scheduler: SchedulerMixin) -> bool:
    return type(scheduler).__name__.startswith(PRECONDITIONED)


def schedule(scheduler: SchedulerMixin) -> Schedule:
    """EDM's noise by its angle: x_t is its x_0 + sigma eps, brought to a norm of 1."""
    return (TrigFlow(atan(scheduler.config.sigma_max)) if by_edm(scheduler)
            else VariancePreserving.of(scheduler.alphas_cumprod))


def timestep(t: Tensor, scheduler: SchedulerMixin) -> Tensor:
    """By EDM's clock ln(sigma) / 4, of consistency models 1000 of it; no less than at the least noise that they are
    taught."""
    if not by_edm(scheduler):
        return node(t, scheduler)
    sigma = schedule(scheduler).angle(t).tan().clamp(min=scheduler.config.sigma_min)
    return sigma.log() * (250 if isinstance(scheduler, CMStochasticIterativeScheduler) else 0.25)


def scaling(t: Tensor, scheduler: SchedulerMixin) -> Tensor:
    """Karras et al. 2022, arXiv:2206.00364, table 1: c_in of the x that is x_t / alpha."""
    if not by_edm(scheduler):
        return torch.ones_like(t)
    alpha, sigma = schedule(scheduler).alpha(t), schedule(scheduler).sigma(t)
    return torch.hypot(sigma, alpha * scheduler.config.sigma_data) ** -1


def read(pipeline: DiffusionPipeline, prompt: str) -> int | None:
    """The class of "class 3"; None of "" where the network knows no classes. RequestError for any other prompt."""
    classes, numbered = pipeline.unet.config.num_class_embeds, re.fullmatch(r"class (\d+)", prompt.strip())
    if classes is None and prompt.strip():
        raise RequestError(f"a network without classes is asked for nothing, by the prompt \"\"; found {prompt!r}: "
                           "leave prompts out, or let data.prompts be none")
    if classes is not None and (numbered is None or int(numbered[1]) >= classes):
        raise RequestError(f"a prompt of this pipeline names a class, as class 0 to class {classes - 1}; found "
                           f"{prompt!r}")
    return None if classes is None else int(numbered[1])


def some(pipeline: DiffusionPipeline) -> str:
    return "" if pipeline.unet.config.num_class_embeds is None else "class 0"


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """label (B,); 0 of networks that know no classes and are told none, and where there is no prompt, which nothing is
    drawn from."""
    labels = [read(teacher.loaded, prompt) or 0 if prompt else 0 for prompt in prompts]
    return Condition(label=torch.tensor(labels, device=teacher.device))


def inputs(network: UNet2DModel, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    labels = None if network.config.num_class_embeds is None else cond.label
    return {"sample": x_t, "timestep": timestep, "class_labels": labels, "return_dict": False}


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    config = parts["unet"].config
    own = tuple(config.sample_size) if isinstance(config.sample_size, list | tuple) else (config.sample_size,) * 2
    if size not in (None, own):
        raise RequestError(f"its pictures have {own[0]} x {own[1]} pixels, and no call of its pipeline asks for "
                           f"others; found {size[0]} x {size[1]}")
    return config.in_channels, *own


def noise_refusals(scheduler: SchedulerMixin) -> dict[str, bool]:
    config = scheduler.config
    return {
        f"its scheduler has sigma_data: {config.sigma_data}, and networks of {SIGMA_DATA} "
        "are served": config.sigma_data != SIGMA_DATA,
        f"its scheduler has prediction_type: {config.get('prediction_type')}": config.get("prediction_type", "epsilon")
        != "epsilon",
    } if by_edm(scheduler) else discrete_refusals(scheduler)


def refusals(parts: Parts) -> dict[str, bool]:
    network = parts["unet"].config
    return {
        f"its pictures have {network.in_channels} channels, and those of 3 are served": network.in_channels != 3,
        f"its network gives {network.out_channels} channels for {network.in_channels}": network.out_channels
        != network.in_channels,
        "its network's config says no sample_size": network.sample_size is None,
        f"its network embeds its time as {network.time_embedding_type}": network.time_embedding_type != "positional",
        f"its network reads classes as {network.class_embed_type}": network.class_embed_type is not None,
        "its pictures should be squares, as ConsistencyModelPipeline draws them, which "
        "alone calls it": not isinstance(network.sample_size, int)
            and (network.num_class_embeds is not None or by_edm(parts["scheduler"])),
        **noise_refusals(parts["scheduler"]),
    }


FAMILY = Family(
    name="unet2d", denoiser="unet", targets=TARGETS, seeded_steps=True, guidance=lambda network: Guidance(None),
    called_by=called_by,
    time=TimeEmbedding("time_embedding.linear_1", "time_proj"),
    prompts=Prompts("class_labels", read, count="batch_size", any=some),
    reads=lambda network: "nothing" if network.config.num_class_embeds is None else "classes",
    encode=encode, condition_shapes=lambda parts, call: {"label": ()}, inputs=inputs, latent_shape=latent_shape,
    call=lambda parts, size: {},
    codec=lambda parts: Points(), refusals=refusals,
    unserved=dict.fromkeys(("guidance", "data.samples.guidance", "data.pairs.guidance"), UNGUIDED),
    schedule=schedule, kind=lambda scheduler: "edm" if by_edm(scheduler) else KINDS[scheduler.config.prediction_type],
    timestep=timestep, scaling=scaling, **UNET)
