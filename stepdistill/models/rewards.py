"""Rewards: what people prefer, as a score of pictures and their prompts, with gradients to the pixels.

PickScore (Kirstain et al. 2023, arXiv:2305.01569): exp(logit_scale) cos of a CLIP-H's projections of picture and
prompt. HPSv2 (Wu et al. 2023, arXiv:2306.09341): cos of those of a CLIP-H, as its own hpsv2.score gives it, without the
scale. On Shapes: the mean log probability of the attributes that a caption asks for, by the shipped CLIP and its judge.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.utils import cached_file

from .. import resources
from ..errors import RequestError, first_lines
from ..files import foreign
from ..files.whole import checksum
from .heads import uncast
from .reading import JUDGE, AttributeClassifier, Reading, preprocessor, readable
from .sources import UNLOADABLE

Slots = Mapping[str, Sequence[str]]
# a prompt -> the values that it asks for, (slots,); None of what is no caption
Attributes = Callable[[str], Tensor | None]
CONFIG, WEIGHTS, PROCESSOR, TOKENIZER = "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"


@dataclass(frozen=True)
class Kind:
    """licence: of the published weights. scaled: whether the CLIP's own logit_scale multiplies the cosine. published:
    the Hub id that is read unless a place is given; None where what is published cannot be read, and `instead` says
    what can. folder: what ships."""

    licence: str
    scaled: bool = False
    published: str | None = None
    folder: str | None = None
    instead: str = ""


REWARDS: dict[str, Kind] = {
    "pickscore": Kind("none is named by the card of the published weights, which were trained from a CLIP-H under MIT",
                      True, "yuvalkirstain/PickScore_v1"),
    "hpsv2": Kind("Apache-2.0", instead="its weights (xswu/HPSv2) are published as a pickle, which is never read: "
                                        "name the folder or Hub id of a CLIPModel that they were converted to, "
                                        "with its preprocessor_config.json and tokenizer, as hpsv2=FOLDER"),
    "imagereward": Kind("Apache-2.0", instead="its weights are published as a pickle of a BLIP with a head of its "
                                              "own, for which transformers has no class, so that code from elsewhere "
                                              "would have to run: use pickscore or hpsv2, or a metric of a plugin "
                                              "(docs/plugins.md)"),
    "shapes_reward": Kind("that of this package", folder="assets/shapes-clip"),
}


class ClipReward(nn.Module):
    """reward(pixels, prompts) -> (B,) float32: cos of a CLIPModel's projections, times its exp(logit_scale) where
    `scaled`.

    pixels (B, 3, H, W) in [-1, 1], of any size: they are resized and normalised as the model's processor does it, but
    for its rounding and clipping to 8 bits after each axis. Frozen, in float32 under autocast too; gradients flow to
    the pixels. id: a hash of its files.
    """

    def __init__(self, folder: Path, scaled: bool, device: str | torch.device = "cpu") -> None:
        super().__init__()
        with readable(folder):
            self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(device)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
            self.read = Reading(folder, self.model.config.vision_config.image_size, device)
        self.eval().requires_grad_(False)
        self.scale = self.model.logit_scale.exp().item() if scaled else 1.0
        self.id = _id(folder)

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        _demand(pixels, prompts)
        shown = self.read(pixels)
        with uncast(shown):
            tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True,
                                    return_tensors="pt").to(shown.device)
            images = self.model.get_image_features(pixel_values=shown).pooler_output
            return self.scale * F.cosine_similarity(images, self.model.get_text_features(**tokens).pooler_output)


class ShapesReward(nn.Module):
    """reward(pixels, prompts) -> (B,) float32: the mean over slots of log p(value that the caption asks for | picture),
    at most 0.

    As `ClipReward` otherwise. RequestError for a prompt that is no caption of Shapes.
    """

    def __init__(self, folder: Path, slots: Slots, attributes: Attributes, device: str | torch.device = "cpu") -> None:
        super().__init__()
        with readable(folder):
            self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(device)
            self.read = Reading(folder, self.model.config.vision_config.image_size, device)
        self.eval().requires_grad_(False)
        self.judge, self.attributes = AttributeClassifier.load(folder / JUDGE, slots), attributes
        self.id = _id(folder)

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        _demand(pixels, prompts)
        asked = [self.attributes(prompt) for prompt in prompts]
        if any(values is None for values in asked):
            odd = next(prompt for prompt, values in zip(prompts, asked, strict=True) if values is None)
            raise RequestError("shapes_reward scores captions of Shapes, such as 'a red ring left of a blue square "
                               f"on a plain navy background'; found {odd!r:.200}")
        shown = self.read(pixels)
        with uncast(shown):
            logits = self.judge.logits(self.model.get_image_features(pixel_values=shown).pooler_output)
            wanted = torch.stack(asked, 1).to(shown.device)
            return -torch.stack([F.cross_entropy(of_slot, value, reduction="none")
                                 for of_slot, value in zip(logits, wanted, strict=True)]).mean(0)


class PlannedReward(nn.Module):
    """A reward before its weights are read, on the meta device: of the same network, so that it is as large and keeps
    as much for gradients."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        with readable(folder), torch.device("meta"):
            self.model = CLIPModel(CLIPConfig.from_pretrained(folder)).float()
            self.read = Reading(folder, self.model.config.vision_config.image_size, "meta")
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        shown = self.read(pixels)
        with uncast(shown):
            return self.model.get_image_features(pixel_values=shown).pooler_output.mean(1)


Reward = ClipReward | ShapesReward


def load_reward(asked: str, slots: Slots, attributes: Attributes, device: str | torch.device = "cpu") -> Reward:
    """asked: a name of REWARDS, or NAME=PLACE with the folder or Hub id of its weights. slots, attributes: of Shapes.

    RequestError for a name that is none, and where the weights cannot be had: never others in their place.
    """
    name, _ = where(asked)
    folder = find_reward(asked, weights=True)
    if name == "shapes_reward":
        return ShapesReward(folder, slots, attributes, device)
    return ClipReward(folder, REWARDS[name].scaled, device)


def where(asked: str) -> tuple[str, str]:
    """The name of a reward, and the folder or Hub id of its weights. RequestError for one that is none, or has no place
    that could be read."""
    name, given, place = asked.partition("=")
    if name not in REWARDS:
        raise RequestError(f"there is no reward {name}: known are {', '.join(REWARDS)}")
    if given and not place:
        raise RequestError(f"{asked} names no place: say {name}=FOLDER, or {name} alone where its weights are to be "
                           "those that it has unless given")
    kind = REWARDS[name]
    if name == "imagereward" or not place and kind.published is None and kind.folder is None:
        raise RequestError(f"{name} cannot be loaded: {kind.instead}")
    return name, place or kind.published or kind.folder


def find_reward(asked: str, weights: bool = False) -> Path:
    """The folder of a reward's files, as `load_reward` reads them. weights: whether those of a Hub id are fetched too,
    beside its configs."""
    name, place = where(asked)
    files = (CONFIG, WEIGHTS, PROCESSOR, JUDGE if name == "shapes_reward" else TOKENIZER)
    return _folder(name, place, files, [file for file in files if weights or file != WEIGHTS])


def _folder(name: str, place: str, files: Sequence[str], fetched: Sequence[str]) -> Path:
    """Where a reward's files lie here; of a Hub id some are fetched into its cache. RequestError with what to do where
    they cannot be had, or are not what they should be."""
    found = resources.locate(place)
    if found is None:
        try:
            if not resources.is_hub_id(place):
                raise OSError("there is no such folder")
            found, files = [Path(cached_file(place, file)).parent for file in fetched][0], fetched
        except UNLOADABLE as error:
            raise RequestError(f"the weights of {name} cannot be had from {place}: {first_lines(error)}. Download "
                               f"them where there is a network, and name their folder: {name}=FOLDER with "
                               f"{', '.join(files)}") from error
    if missing := [file for file in files if not (found / file).is_file()]:
        raise RequestError(f"{found} does not hold {name}: it lacks {', '.join(missing)}. A CLIPModel saved by "
                           "save_pretrained, with its processor, has them")
    foreign.check_folder(found, [])
    with readable(found):
        kind, given = AutoConfig.from_pretrained(found, trust_remote_code=False).model_type, preprocessor(found)
    if kind != "clip" or not {"image_mean", "image_std"} <= given.keys():
        lacks = f"is a {kind}" if kind != "clip" else f"has no image_mean and image_std in its {PROCESSOR}"
        raise RequestError(f"{found} cannot be read as {name}: it {lacks}, and a CLIPModel with its "
                           "processor is wanted")
    return found


def _id(folder: Path) -> str:
    return checksum(folder / WEIGHTS)[:12]


def _demand(pixels: Tensor, prompts: Sequence[str]) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) != len(prompts):
        raise ValueError(f"a reward reads pixels (B, 3, H, W) and B prompts; found {tuple(pixels.shape)} and "
                         f"{len(prompts)}")
