"""What several families say alike: sizes of latents, times, maps of features, and pipelines that are not served."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...diffusion.schedule import RectifiedFlow, VariancePreserving
from ...errors import RequestError
from . import Parts, Shape, Size

if TYPE_CHECKING:
    from ..teacher import Teacher

# prediction_type of a scheduler -> what its network predicts
KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def sides_of(own: Any) -> tuple[int, int]:
    """Height and width of a config's sample_size, which may be one number for both. RequestError for what is no
    size."""
    sides = tuple(own) if isinstance(own, list | tuple) else (own, own)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise RequestError(f"its network's config says sample_size: {own!r}, which is no size: it should be a whole "
                           "number above 0, or height and width")
    return sides


def latent_sides(size: Size, own: Any, pixels: int, multiple: int) -> tuple[int, int]:
    """Height and width of latents: `own` where no size is given. own: as a config's sample_size; pixels: of a side of
    one latent; multiple: of which the stock pipeline takes a picture's sides. RequestError for any other, and where
    nothing says one."""
    if size is None and own is None:
        raise RequestError("its network's config says no sample_size: let the recipe's resolution say the "
                           "pictures' size")
    if size is None:
        size = tuple(side * pixels for side in sides_of(own))
    if wrong := [side for side in size if side <= 0 or side % multiple]:
        raise RequestError(f"its pictures have sides of a multiple of {multiple} pixels; found {wrong[0]} of {size[0]} "
                           f"x {size[1]}")
    return size[0] // pixels, size[1] // pixels


def one_size(size: Size, own: tuple[int, ...]) -> tuple[int, ...]:
    """Height and width of pictures that no call of a pipeline can be asked for otherwise. RequestError for others."""
    if size not in (None, own):
        raise RequestError(f"its pictures have {own[0]} x {own[1]} pixels, and no call of its pipeline asks for "
                           f"others; found {size[0]} x {size[1]}")
    return own


def whole(teacher: Teacher, like: Tensor) -> Tensor:
    """What a network is told of pictures of the teacher's own size, as `data.buckets.told` says it, (B, 6): nothing of
    them is cut off. like: (B, ...)."""
    height, width = (side * codec_pixels(teacher.parts["vae"]) for side in teacher.latent_shape[1:])
    return like.new_tensor([[height, width, 0, 0, height, width]]).expand(len(like), 6)


def clip_skip(teacher: Teacher) -> int | None:
    """Last layers of its CLIP encoders that every call leaves out. RequestError where its stock pipeline cannot."""
    skip = teacher.call.get("clip_skip")
    if (skip is not None and "text_encoder_2" not in teacher.parts
        and "text_model" not in dir(teacher.parts["text_encoder"])):
        raise RequestError(f"{teacher.source} is to skip {skip} layers of its text encoder by clip_skip, which "
                           "its stock pipeline looks for where the installed transformers has them no more: leave "
                           "clip_skip out, or install transformers 4")
    return skip


def masked_text(width: str) -> Callable[[Parts, Mapping[str, Any]], dict[str, tuple[int, ...]]]:
    """The condition_shapes of a text that is padded to max_sequence_length, with its mask. width: of a token, as the
    config of the network names it."""
    def shapes(parts: Parts, call: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        length = call["max_sequence_length"]
        return {"text": (length, parts["transformer"].config[width]), "mask": (length,)}
    return shapes


def class_number(prompt: str) -> int | None:
    """3 of "class 3"; None of any other prompt."""
    found = re.fullmatch(r"class (\d+)", prompt.strip())
    return int(found[1]) if found else None


def codec_pixels(vae: nn.Module) -> int:
    """Pixels of a side of one latent of an AutoencoderKL."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def node(t: Tensor, scheduler: Any) -> Tensor:
    """What a network of N discrete times is told: N t - 1, a whole number when within 1e-6 of one."""
    told = t * len(scheduler.alphas_cumprod) - 1
    nearest = told.round()
    return torch.where((told - nearest).abs() < 1e-6, nearest, told)


def token_shapes(network: nn.Module, shape: tuple[int, ...]) -> dict[str, Shape]:
    """The blocks of a transformer of one stream -> (C, H, W) of their tokens, of which each is a square of the
    picture."""
    config = network.config
    width, sides = (config.num_attention_heads * config.attention_head_dim,
                    (side // config.patch_size for side in shape[1:]))
    return dict.fromkeys((f"transformer_blocks.{i}" for i in range(config.num_layers)), (width, *sides))


def token_map(network: nn.Module, tokens: Tensor, x_t: Tensor) -> Tensor:
    """Such tokens (B, N, D), row by row, as a map (B, D, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(side // network.config.patch_size for side in x_t.shape[2:]))


def middle_block(network: nn.Module) -> tuple[str, ...]:
    return (f"transformer_blocks.{network.config.num_layers // 2}",)


def without_sigma(raw: tuple[Tensor, ...], x_t: Tensor) -> Tensor:
    """The channels of the prediction, before those of a variance that the network learned too and its pipeline
    drops."""
    return raw[0][:, :x_t.shape[1]]


def unet_blocks(network: nn.Module, shape: tuple[int, ...]) -> dict[str, Shape]:
    """The blocks of a UNet -> (C, H, W) of their outputs."""
    widths, sizes = network.config.block_out_channels, [shape[1:]]
    for _ in widths[1:]:
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    last = len(widths) - 1
    down = {f"down_blocks.{i}": (width, *sizes[min(i + 1, last)]) for i, width in enumerate(widths)}
    up = {f"up_blocks.{i}": (width, *sizes[max(last - i - 1, 0)]) for i, width in enumerate(reversed(widths))}
    middle = {} if network.config.mid_block_type is None else {"mid_block": (widths[-1], *sizes[-1])}
    return {**down, **middle, **up}


def bottleneck(network: nn.Module) -> tuple[str, ...]:
    """Of a UNet, where DMD2 (arXiv:2405.14867) puts its head."""
    return (("mid_block",) if network.config.mid_block_type is not None
            else (f"down_blocks.{len(network.config.block_out_channels) - 1}",))


def unet_map(network: nn.Module, output: Any, x_t: Tensor) -> Tensor:
    """What a block of a UNet gave, as a map: some give what they skip, too."""
    return output if isinstance(output, Tensor) else output[0]


def channel_refusals(reads: int, gives: int | None, latents: int) -> dict[str, bool]:
    """Of a network on a codec's latents. gives: None for as many as it reads."""
    return {f"its network reads {reads} channels and its latents have {latents}": reads != latents,
            f"its network gives {gives} channels for {reads}": gives not in (None, reads)}


def variance_refusals(parts: Parts) -> dict[str, bool]:
    """Of a transformer on a codec's latents, which may have learned a variance beside its prediction."""
    reads, gives = parts["transformer"].config.in_channels, parts["transformer"].config.out_channels
    return channel_refusals(reads, reads if gives == 2 * reads else gives, parts["vae"].config.latent_channels)


def shift_refusals(vae: nn.Module) -> dict[str, bool]:
    """Of a codec whose latents its pipeline shifts."""
    return {"its codec says no shift_factor, which its pipeline adds to latents": vae.config.shift_factor is None}


def discrete_refusals(scheduler: Any) -> dict[str, bool]:
    """Of a scheduler of discrete times."""
    return {
        f"its scheduler {type(scheduler).__name__} has no alphas_cumprod": "alphas_cumprod" not in vars(scheduler),
        f"its prediction type is none of {', '.join(KINDS)}": scheduler.config.get("prediction_type") not in KINDS,
    }


def flow_refusals(scheduler: Any) -> dict[str, bool]:
    """Of a scheduler of flow matching."""
    name = type(scheduler).__name__
    return {f"its scheduler {name} is none of flow matching": not name.startswith("FlowMatch")}


def solved_flow_refusals(scheduler: Any) -> dict[str, bool]:
    """As `flow_refusals`, of pipelines that are released with a solver of diffusion that is told of a flow."""
    name = type(scheduler).__name__
    flow = name.startswith(("FlowMatch", "FlowMap")) or scheduler.config.get("prediction_type") == "flow_prediction"
    return {f"its scheduler {name} is none of flow matching": not flow}


def stream_blocks(network: nn.Module, middle: bool = False) -> tuple[str, ...]:
    """The blocks of a transformer whose text and picture are two streams at first and one after that, or the one in the
    middle."""
    config = network.config
    found = (*(f"transformer_blocks.{i}" for i in range(config.num_layers)),
             *(f"single_transformer_blocks.{i}" for i in range(config.num_single_layers)))
    return (found[len(found) // 2],) if middle else found


# Fields of families: of flows, of schedulers of discrete times, of a transformer of one stream, and of a UNet.
FLOW: Mapping[str, Any] = {"schedule": lambda scheduler: RectifiedFlow(), "kind": lambda scheduler: "velocity",
                           "timestep": lambda t, scheduler: t * scheduler.config.num_train_timesteps}
DISCRETE: Mapping[str, Any] = {"schedule": lambda scheduler: VariancePreserving.of(scheduler.alphas_cumprod),
                               "timestep": node,
                               "kind": lambda scheduler: KINDS[scheduler.config.prediction_type]}
ONE_STREAM: Mapping[str, Any] = {"output": without_sigma, "feature_shapes": token_shapes, "feature_map": token_map,
                                 "default_features": middle_block}
UNET: Mapping[str, Any] = {"feature_shapes": unet_blocks, "default_features": bottleneck, "feature_map": unet_map}
