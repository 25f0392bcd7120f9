"""Network families: what differs from one kind of pipeline to another, one file each. What they share is `models.teacher`'s."""
from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ...diffusion.contracts import Condition
from ...diffusion.prediction import linear
from ...diffusion.schedule import Schedule
from ...errors import RequestError
from ..codecs import Codec
from ..extra_embedding import TimeEmbedding
from ..stock import Guidance, Prompts
from ..vision import Sight, published

if TYPE_CHECKING:
    from ..teacher import Teacher

FAMILIES = {                                       # pipeline class -> module of this package
    "StableDiffusionPipeline": "unet2d_condition",
    "StableDiffusionXLPipeline": "unet2d_condition",
    "StableDiffusion3Pipeline": "sd3",
    "Toy": "toy",                                  # no pipeline of diffusers: a mixture in the plane, in closed form
}
Shape = tuple[int, int, int]                       # channels, height, width
Parts = Mapping[str, Any]                          # the components of a pipeline by name
Size = tuple[int, int] | None                      # height and width in pixels; None: the network's own


def family_of(class_name: str) -> Family:
    """The row of a pipeline class, a key of FAMILIES."""
    return import_module(f".{FAMILIES[class_name]}", __package__).FAMILY


def text_to_image(class_name: str) -> str:
    """The class that a pipeline is served as: one that draws over pictures has the components of its kin that draws from texts alone."""
    kin = re.sub("Img2Img|Inpaint", "", class_name)
    return kin if kin in FAMILIES else class_name


def served(source: object, class_name: str) -> str:
    """As `text_to_image`. RequestError, with the nearest names first, for a class that no family is for."""
    if (kin := text_to_image(class_name)) in FAMILIES:
        return kin
    near = difflib.get_close_matches(class_name, FAMILIES, n=len(FAMILIES), cutoff=0.0)
    raise RequestError(f"{source} is a {class_name}, which has no family here yet; supported are {', '.join(near)}. "
                       "docs/add_a_family.md says how to add one")


def stock_guidance(pipeline: DiffusionPipeline) -> Guidance:
    """How a call of it speaks of guidance: as most do, where no family describes its class."""
    name = type(pipeline).__name__
    if name not in FAMILIES:
        return Guidance()
    family = family_of(name)
    return family.guidance(pipeline.components[family.denoiser])


def stock_prompts(pipeline: DiffusionPipeline) -> Prompts:
    """How a call of it takes prompts and gives pictures: as most do, where no family describes its class."""
    name = type(pipeline).__name__
    return family_of(name).prompts if name in FAMILIES else Prompts()


def latent_sides(size: Size, own: tuple[int, int], pixels: int, multiple: int) -> tuple[int, int]:
    """Height and width of latents: `own` where no size is given. pixels: of a side of one latent; multiple: of which the stock pipeline
    takes a picture's sides. RequestError for any other."""
    if size is None:
        return own
    if wrong := [side for side in size if side % multiple]:
        raise RequestError(f"its pictures have sides of a multiple of {multiple} pixels; found {wrong[0]} of {size[0]} x {size[1]}")
    return size[0] // pixels, size[1] // pixels


def codec_pixels(vae: nn.Module) -> int:
    """Pixels of a side of one latent of an AutoencoderKL."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def fresh(network: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A stock network of the same config, changed by `config`, without values."""
    with torch.device("meta"):
        return type(network).from_config(network.config, **config)


def no_arguments(class_name: str) -> dict[str, Any]:
    return {}


def no_refusals(parts: Parts) -> dict[str, bool]:
    return {}


def first(found: tuple[Tensor, ...], x_t: Tensor) -> Tensor:
    return found[0]


@dataclass(frozen=True)
class Family:
    """What a kind of pipeline says of itself. Everything else about a teacher is the same for all, see `models.teacher.Teacher`.

    name: its module. denoiser: the name of the network that is distilled, among the pipeline's components.
    schedule, kind: of the teacher's scheduler, the noise schedule and what the network predicts, a key of PARAMETERISATIONS.
    timestep: t (B,) float64 on the CPU, and the scheduler -> what the network is told, float64; timestep_dtype: in which it is told,
    None for the network's own.
    time: where the network embeds it.
    encode: the condition of prompts without its null, or, `null`, the one that the stock pipeline subtracts; one row a prompt.
    condition_shapes: name -> shape of one row of it, from configs alone; the teacher's keyword arguments of every call count.
    inputs: network, x_t in the network's dtype, timestep, cond -> keyword arguments of its forward, x_t first.
    output: what forward gave and x_t -> the raw prediction, in the shape of x_t.
    feature_shapes: network, latent_shape -> modules that a discriminator may read, in the order in which they run, with the
    (C, H, W) of their maps;
    default_features: those that it reads unless told otherwise; feature_map: network, a module's output and x_t -> map (B, C, H, W).
    latent_shape: of one sample, from the components and the pictures' size. targets: LoRA targets, those that no network has included. codec: of the components.
    samples: what they are. guidance: how a call of a pipeline with this network speaks of it; prompts: and of prompts and pictures.
    combine: how the pipeline mixes raw outputs, combine(given, without, w). seeded_steps: whether a call's generator reaches the scheduler.
    arguments: keyword arguments of from_pretrained for a class; optional: components that its class must be told to do without.
    refusals: reason -> whether it holds, for pipelines of the class that this row does not translate.
    fresh: network, entries of its config -> a new one without values. open: for what is no pipeline of diffusers: source -> components.
    vision: the network whose features judge samples, by the name that a recipe gives or the usual one.
    unserved: entries of a recipe that it does not serve -> why not. no_pipeline: why there is none to leave with.
    """

    name: str
    denoiser: str
    schedule: Callable[[Any], Schedule]
    kind: Callable[[Any], str]
    timestep: Callable[[Tensor, Any], Tensor]
    time: TimeEmbedding
    encode: Callable[[Teacher, list[str], bool], Condition]
    condition_shapes: Callable[[Parts, Mapping[str, Any]], Mapping[str, tuple[int, ...]]]
    inputs: Callable[[nn.Module, Tensor, Tensor, Condition], dict[str, Any]]
    feature_shapes: Callable[[nn.Module, tuple[int, ...]], dict[str, Shape]]
    default_features: Callable[[nn.Module], tuple[str, ...]]
    feature_map: Callable[[nn.Module, Any, Tensor], Tensor]
    latent_shape: Callable[[Parts, Size], tuple[int, ...]]
    targets: tuple[str, ...]
    codec: Callable[[Parts], Codec]
    output: Callable[[Any, Tensor], Tensor] = first
    timestep_dtype: torch.dtype | None = torch.float32
    null_prompt: str = ""
    samples: Literal["pictures", "points"] = "pictures"
    guidance: Callable[[nn.Module], Guidance] = lambda network: Guidance()
    prompts: Prompts = Prompts()
    combine: Callable[[Tensor, Tensor, Tensor], Tensor] = linear
    seeded_steps: bool = False
    arguments: Callable[[str], Mapping[str, Any]] = no_arguments
    optional: tuple[str, ...] = ()
    refusals: Callable[[Parts], Mapping[str, bool]] = no_refusals
    fresh: Callable[[nn.Module, Mapping[str, Any]], nn.Module] = fresh
    open: Callable[[str, torch.dtype], Parts] | None = None
    vision: Callable[[str | None], Sight] = published
    unserved: Mapping[str, str] = field(default_factory=dict)
    no_pipeline: str | None = None
