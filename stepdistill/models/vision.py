"""A discriminator on pictures: features of a frozen vision transformer, and trained heads on them that read the
prompt."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, CLIPModel, CLIPVisionModel, Dinov2Model, Dinov2WithRegistersModel, PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..diffusion.contracts import Condition
from ..diffusion.draws import key
from ..errors import RequestError, first_lines
from ..files import foreign
from .discriminator import chosen
from .heads import Shape, prompt_vector, token_heads, uncast

PUBLISHED = "facebook/dinov2-small"      # Sauer et al. 2023, arXiv:2311.17042, table 1: the best of four
PLANE_WIDTH = 128
CLASSES: dict[str, tuple[type[nn.Module], str]] = {    # model type -> its class, and where in it the vision transformer
                                                       # lies
    "dinov2": (Dinov2Model, ""),
    "dinov2_with_registers": (Dinov2WithRegistersModel, ""),
    "clip": (CLIPModel, "vision_model"),
    "clip_vision_model": (CLIPVisionModel, ""),
}


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer before its weights are read: its configs, the side of the pictures that it is shown, their
    mean and deviation by channel for pixels in [0, 1]."""

    source: str
    config: PretrainedConfig
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, source: str) -> VisionConfig:
        """source: a folder or Hub id of a transformers model. RequestError for one that is missing or not of
        CLASSES."""
        if Path(source).is_dir():
            foreign.check_folder(Path(source), [])
            foreign.check_pickles(Path(source))
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            processor, _ = BaseImageProcessor.get_image_processor_dict(source)
        except (OSError, ValueError) as error:
            raise RequestError(f"there is no vision network {source} with its preprocessor_config.json (a folder such "
                               "as assets/shapes-clip "
                               f"or a Hub id such as {PUBLISHED} would do): {first_lines(error)}") from error
        if config.model_type not in CLASSES:
            raise RequestError(f"the vision network {source} is a {config.model_type}; features are read of "
                               f"{', '.join(CLASSES)}")
        size = processor.get("crop_size") or processor["size"]
        return cls(source, config, size["height"], tuple(processor["image_mean"]), tuple(processor["image_std"]))

    @property
    def shapes(self) -> dict[str, Shape]:
        """What can be read: the embedded patches and every layer's output -> (C, H, W)."""
        config = self.config.vision_config if self.config.model_type == "clip" else self.config
        names = ("embeddings", *(f"layers.{i}" for i in range(config.num_hidden_layers)))
        return dict.fromkeys(names, (config.hidden_size, self.side // config.patch_size,
                                     self.side // config.patch_size))

    @property
    def default(self) -> tuple[str, ...]:
        """The embedded patches and four layers at even distances, the last one among them: those of StyleGAN-T,
        arXiv:2301.09515."""
        names = tuple(self.shapes)
        return tuple(dict.fromkeys(names[round(i * (len(names) - 1) / 4)] for i in range(5)))

    def read(self, names: Sequence[str] | None) -> dict[str, Shape]:
        """Those of `names`, or the default ones, in the order in which it runs. RequestError for one that it has
        not."""
        return chosen(self.shapes, self.default if names is None else names)

    def network(self) -> nn.Module:
        """A new one with random weights."""
        cls, path = CLASSES[self.config.model_type]
        return cls(self.config).get_submodule(path)

    def features(self, names: Sequence[str], device: torch.device) -> Vision:
        """On the meta device a network without weights."""
        if device.type == "meta":
            with device:
                return Vision(self, names, self.network())
        return Vision(self, names, self.trained())

    def trained(self) -> nn.Module:
        cls, path = CLASSES[self.config.model_type]
        try:
            return cls.from_pretrained(self.source, dtype=torch.float32, use_safetensors=True).get_submodule(path)
        except (OSError, SafetensorError) as error:
            raise RequestError(f"the weights of the vision network {self.source} cannot be loaded: "
                               f"{first_lines(error)}") from error


class Vision(nn.Module):
    """features(pixels) -> one map (B, C, H, W) for each of `names`. Frozen and float32; gradients flow to the pixels.

    pixels (B, 3, H, W) in [-1, 1]; those of another size than the network's are brought to it, bicubic and antialiased.
    """

    def __init__(self, vision_config: VisionConfig, names: Sequence[str], network: nn.Module) -> None:
        super().__init__()
        self.side, self.places = vision_config.side, [tuple(vision_config.shapes).index(name) for name in names]
        self.grid = vision_config.shapes[names[0]][1:]
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(vision_config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(vision_config.std)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        if pixels.shape[-2:] != (self.side, self.side):
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True)
        with uncast(pixels):
            shown = (pixels.float() / 2 + 0.5 - self.mean) / self.std
            tokens = self.network(pixel_values=shown, output_hidden_states=True).hidden_states
        return [self._map(tokens[place]) for place in self.places]

    def _map(self, tokens: Tensor) -> Tensor:
        """Its last tokens are those of patches, row by row; before them come the class and registers."""
        height, width = self.grid
        return tokens[:, -height * width:].transpose(1, 2).unflatten(2, (height, width))


class PlaneVisionConfig:
    """What stands for a vision network where samples are points of the plane: a random one of three layers, always the
    same."""

    shapes = dict.fromkeys(("layers.0", "layers.1", "layers.2"), (PLANE_WIDTH, 1, 1))

    def read(self, names: Sequence[str] | None) -> dict[str, Shape]:
        return chosen(self.shapes, tuple(self.shapes) if names is None else names)

    def features(self, names: Sequence[str], device: torch.device) -> PlaneFeatures:
        return PlaneFeatures(names)


class PlaneFeatures(nn.Module):
    """features(points (B, 2, 1, 1)) -> one map (B, C, 1, 1) for each of `names`."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.places = [tuple(PlaneVisionConfig.shapes).index(name) for name in names]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key("features of the plane"))
            sizes = pairwise((2, *[PLANE_WIDTH] * len(PlaneVisionConfig.shapes)))
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(*pair), nn.SiLU())
                                         for pair in sizes]).requires_grad_(False)

    def forward(self, points: Tensor) -> list[Tensor]:
        states = [points.flatten(1)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return [states[place + 1][:, :, None, None] for place in self.places]


def published(source: str | None) -> VisionConfig:
    """The vision network that a recipe names, or the published one."""
    return VisionConfig.of(source or PUBLISHED)


class PictureHeads(nn.Module):
    """discriminator(maps, cond) -> a logit at each position of the K maps that a `Vision` gives, K of (B, N); higher is
    more real.

    float32, also under autocast; first values are a function of (seed, feature). width: of `prompt_vector(cond)`, which
    they are told.
    """

    def __init__(self, shapes: Mapping[str, Shape], width: int, seed: int = 0) -> None:
        super().__init__()
        self.heads = token_heads(shapes, width, seed)

    def forward(self, maps: Sequence[Tensor], cond: Condition) -> list[Tensor]:
        with uncast(maps[0]):
            told = prompt_vector(cond).float()
            return [head(x, told) for head, x in zip(self.heads.values(), maps, strict=True)]
