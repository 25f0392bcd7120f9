"""Network families: what differs from one kind of pipeline to another, one file each. What they share is
`models.teacher`'s."""
from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import diffusers
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
from ..vision import VisionConfig, published

if TYPE_CHECKING:
    from ..teacher import Teacher

FAMILIES: dict[str, str | Family] = {              # pipeline class -> module of this package, or a family from outside
    "StableDiffusionPipeline": "unet2d_condition",
    "StableDiffusionXLPipeline": "unet2d_condition",
    "StableDiffusion3Pipeline": "sd3",
    "SanaPipeline": "sana",
    "DiTPipeline": "dit",
    "PixArtSigmaPipeline": "pixart",
    "PixArtAlphaPipeline": "pixart",
    "FluxPipeline": "flux",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2",
    "ZImagePipeline": "z_image",
    "QwenImagePipeline": "qwen_image",
    "DDPMPipeline": "unet2d",
    "ConsistencyModelPipeline": "unet2d",
    "WanPipeline": "wan",
    "Toy": "toy",                                  # no pipeline of diffusers: a mixture in the plane, in closed form
}
# a pipeline class -> one of the same parts that calls them alike, and takes more schedulers
KIN = {"DDIMPipeline": "DDPMPipeline"}
Shape = tuple[int, ...]                            # channels, height, width; of videos channels, frames, height, width
Parts = Mapping[str, Any]                          # the components of a pipeline by name, and what else its index says
# height, width in pixels, of videos their frames; None: the network's own
Size = tuple[int, ...] | None


def family_of(class_name: str) -> Family:
    """The row of a pipeline class, a key of FAMILIES."""
    row = FAMILIES[class_name]
    return row if isinstance(row, Family) else import_module(f".{row}", __package__).FAMILY


def register_family(pipeline: str, family: Family) -> None:
    """Makes the family of a pipeline class of diffusers known in this process. RequestError for a class that one of
    ours is for, and for one that diffusers has not."""
    if isinstance(FAMILIES.get(pipeline), str):
        raise RequestError(f"{pipeline} has a family of stepdistill's own, which is not replaced")
    if not isinstance(family, Family):
        raise RequestError(f"the family of {pipeline} should be a stepdistill.models.families.Family; found {family!r}")
    if pipeline not in dir(diffusers):
        raise RequestError(f"diffusers {diffusers.__version__} has no {pipeline}: a family is registered for a "
                           "class of its pipelines")
    FAMILIES[pipeline] = family


def text_to_image(class_name: str) -> str:
    """The class that a pipeline is served as: one that draws over pictures has the components of its kin that draws
    from texts alone."""
    kin = KIN.get(class_name) or re.sub("Img2Img|Inpaint", "", class_name)
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


def stock_index(pipeline: DiffusionPipeline) -> Mapping[str, Any]:
    """What its model_index.json is to say, where its class forgets it."""
    name = type(pipeline).__name__
    return family_of(name).index(pipeline) if name in FAMILIES else {}


def sides(parts: Parts, size: Size) -> dict[str, Any]:
    """The keyword arguments of a call that say a size."""
    return {} if size is None else dict(zip(("height", "width", "num_frames"), size, strict=False))


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


def drawn(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit noise, on the generator's device."""
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)


@dataclass(frozen=True)
class Family:
    """What a kind of pipeline says of itself. Everything else about a teacher is the same for all, see
    `models.teacher.Teacher`.

    name: its module. denoiser: the name of the network that is distilled, among the pipeline's components.
    schedule, kind: of the teacher's scheduler, the noise schedule and what the network predicts, a key of
    PARAMETERISATIONS. timestep: t (B,) float64 on the CPU, and the scheduler -> what the network is told, float64;
    timestep_dtype: in which it is told, None for the network's own. weights: the layer whose weights have the network's
    own dtype, the first that reads the time unless given. scaling: t and the scheduler -> (B,), by what x_t is
    multiplied before the network sees it. time: where the network embeds it. encode: the condition of prompts without
    its null, or, `null`, the one that the stock pipeline subtracts; one row a prompt. condition_shapes: name -> shape
    of one row of it, from configs alone and the keyword arguments of a call, its class's defaults among them. inputs:
    network, x_t in the network's dtype, timestep, cond -> keyword arguments of its forward, x_t first. output: what
    forward gave and x_t -> the raw prediction, in the shape of x_t. feature_shapes: network, latent_shape -> modules
    that a discriminator may read, in the order in which they run, with the (C, H, W) of their maps, of videos (C, F, H,
    W); default_features: those that it reads unless told otherwise; feature_map: network, a module's output and x_t ->
    map (B, C, H, W). latent_shape: of one sample, from the components and the pictures' size; multiple: of how many
    pixels the sides of its pictures are, None where it draws one size alone. targets: LoRA targets, those that no
    network has included. codec: of the components. samples: what they are. video: height, width and frames of a call
    that names none; None: its samples are no videos. guidance: how a call of a pipeline with this network speaks of it;
    prompts: and of prompts and pictures. call: the keyword arguments of every call of a pipeline, from the components
    and the pictures' size. combine: how the pipeline mixes raw outputs, combine(given, without, w). seeded_steps:
    whether a call's generator reaches the scheduler. noise_dtype: in which a call draws the noise that it starts from,
    None for that of its text. sigmas: whether a call takes a flow's times; where not, its scheduler makes them of their
    number. step_noise: shape (B, ...), a generator and a dtype -> what the scheduler adds in a step, as a pipeline
    draws it that packs its latents. arguments: keyword arguments of from_pretrained for a class; optional: components
    that its class must be told to do without; index: what a saved pipeline's model_index.json is to say, where its
    class forgets it. refusals: reason -> whether it holds, for pipelines of the class that this row does not translate.
    sized: what is told of pictures' sizes, (B, 6) as `data.buckets.told` says -> time_ids, as its network reads them;
    None where none of this kind does. fresh: network, entries of its config -> a new one without values. open: for what
    is no pipeline of diffusers: source -> components. vision: the network whose features judge samples, by the name
    that a recipe gives or the usual one; reward: its folder -> what scores samples that are no pictures, None where
    they are. unserved: entries of a recipe that it does not serve -> why not. no_pipeline: why there is none to leave
    with. called_by: the index of a pipeline and its network's config -> the class of pipelines that calls it, where
    that may be another than its own. reads: what a prompt of its network is, a text, a class, or nothing.
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
    weights: str | None = None
    samples: Literal["pictures", "points"] = "pictures"
    video: tuple[int, int, int] | None = None
    guidance: Callable[[nn.Module], Guidance] = lambda network: Guidance()
    prompts: Prompts = Prompts()
    call: Callable[[Parts, Size], Mapping[str, Any]] = sides
    combine: Callable[[Tensor, Tensor, Tensor], Tensor] = linear
    seeded_steps: bool = False
    multiple: Callable[[Parts], int] | None = None
    sized: Callable[[Tensor], Tensor] | None = None
    noise_dtype: torch.dtype | None = None
    sigmas: bool = True
    step_noise: Callable[[tuple[int, ...], torch.Generator, torch.dtype], Tensor] = drawn
    arguments: Callable[[str], Mapping[str, Any]] = no_arguments
    optional: tuple[str, ...] = ()
    index: Callable[[DiffusionPipeline], Mapping[str, Any]] = lambda pipeline: {}
    refusals: Callable[[Parts], Mapping[str, bool]] = no_refusals
    fresh: Callable[[nn.Module, Mapping[str, Any]], nn.Module] = fresh
    open: Callable[[str, torch.dtype], Parts] | None = None
    vision: Callable[[str | None], VisionConfig] = published
    reward: Callable[[str], nn.Module] | None = None
    unserved: Mapping[str, str] = field(default_factory=dict)
    no_pipeline: str | None = None
    scaling: Callable[[Tensor, Any], Tensor] | None = None
    called_by: Callable[[Mapping[str, Any], Mapping[str, Any]], str] | None = None
    reads: Callable[[nn.Module], Literal["texts", "classes", "nothing"]] = lambda network: "texts"

    def size(self, sides: tuple[int, int] | None, frames: int | None) -> Size:
        """Of height and width and a number of frames that are asked for, filled up where samples are videos.

        RequestError for frames of pictures.
        """
        if self.video is None:
            if frames is not None:
                raise RequestError(f"a teacher of the family {self.name} makes no videos, and found are {frames} "
                                   "frames: leave them out")
            return sides
        *own, usual = self.video
        return *(sides or own), usual if frames is None else frames
