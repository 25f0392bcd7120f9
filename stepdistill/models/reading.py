"""Pictures as vision models of transformers read them, with gradients, and the judge that reads attributes off their
features."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ..errors import RequestError, first_lines
from .sources import UNLOADABLE

HALVES = [0.5] * 3, [0.5] * 3
JUDGE = "judge.safetensors"                        # beside a CLIPModel


@dataclass(frozen=True)
class AttributeClassifier:
    """Linear heads on image features, one per attribute slot, in the order of its file."""

    heads: tuple[tuple[Tensor, Tensor], ...]
    id: str

    @classmethod
    def load(cls, file: Path, expected: Mapping[str, Sequence[str]]) -> AttributeClassifier:
        """expected: slot -> its values. RequestError for a file of others."""
        with readable(file), safe_open(file, "pt") as saved:
            slots = json.loads(saved.metadata()["slots"])
            if slots != {slot: list(values) for slot, values in expected.items()}:
                raise RequestError(f"{file} classifies the slots {slots}, but Shapes has {dict(expected)}: "
                                   "train it anew")
            heads = tuple((saved.get_tensor(f"{slot}.weight").float(), saved.get_tensor(f"{slot}.bias").float())
                          for slot in expected)
        return cls(heads, digest([file]))

    def __call__(self, features: Tensor) -> Tensor:
        """features (B, D) -> (B, 7) int64: the attributes seen."""
        return torch.stack([logits.argmax(1) for logits in self.logits(features)], 1)

    def logits(self, features: Tensor) -> list[Tensor]:
        """features (B, D) -> (B, values) of each slot."""
        return [features @ weight.to(features).T + bias.to(features) for weight, bias in self.heads]


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """RequestError with the words of a library that cannot read what lies there."""
    try:
        yield
    except UNLOADABLE as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{place} cannot be read as a vision model: {first_lines(error)}. Copy or "
                           "train it anew") from error


class Reading:
    """Pixels (B, 3, H, W) in [-1, 1] as a vision model of transformers reads them: its size, its mean and deviation a
    channel. Gradients flow."""

    def __init__(self, folder: Path, size: int, device: str | torch.device) -> None:
        mean, deviation = (preprocessor(folder).get(f"image_{name}", halves)
                           for name, halves in zip(("mean", "std"), HALVES, strict=True))
        self.size, self.device = size, device
        self.name = f"none at {size} px, else antialiased bicubic of the short side and a centre crop"
        if (mean, deviation) != HALVES:
            self.name += f"; normalised by {mean} and {deviation}"
        self.mean, self.deviation = (torch.tensor(numbers, device=device)[:, None, None] for numbers in
                                     # of pixels in [-1, 1]
                                     ([2 * m - 1 for m in mean], [2 * s for s in deviation]))

    def __call__(self, pixels: Tensor) -> Tensor:
        return (resized(pixels.to(self.device, torch.float32), self.size) - self.mean) / self.deviation


def preprocessor(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json of a model's folder; empty where there is none."""
    file = folder / "preprocessor_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def resized(pixels: Tensor, size: int) -> Tensor:
    """The short side brought to `size`, the long one in proportion, rounded down as transformers and torchvision do it,
    and the centre cut out: (B, 3, size, size). Pictures of that size pass untouched."""
    height, width = pixels.shape[-2:]
    if height == width == size:
        return pixels
    shape = tuple(size * side // min(height, width) for side in (height, width))
    pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[..., top: top + size, left: left + size]


def digest(files: list[Path]) -> str:
    """sha256 of the bytes of the files that exist, in the order given."""
    hashed = hashlib.sha256()
    for file in files:
        if file.is_file():
            hashed.update(file.name.encode() + file.read_bytes())
    return hashed.hexdigest()
