"""Features of pictures: a CLIP model's projections with the attribute classifier on top, or InceptionV3's."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ..data.shapes import SLOTS
from ..errors import RequestError, first_lines
from ..files import foreign
from ..files.whole import checksum
from ..models.loading import UNLOADABLE

INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"   # named by its sha256
HALVES = [0.5] * 3, [0.5] * 3


class Features(Protocol):
    """A feature space. name tells users what it is, id (a hash of its weights) and resize enter the protocol."""

    name: str
    id: str
    dim: int
    resize: str
    attribute_classifier: AttributeClassifier | None

    def images(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> (B, dim) float32 on the CPU."""

    def texts(self, prompts: list[str]) -> Tensor | None:
        """(B, dim) float32 on the CPU; None where the space knows no text."""


@dataclass(frozen=True)
class AttributeClassifier:
    """Linear heads on image features, one per attribute slot, in the order of SLOTS."""

    heads: tuple[tuple[Tensor, Tensor], ...]
    id: str

    @classmethod
    def load(cls, file: Path) -> AttributeClassifier:
        with _readable(file), safe_open(file, "pt") as saved:
            slots = json.loads(saved.metadata()["slots"])
            if slots != {slot: list(values) for slot, values in SLOTS.items()}:
                raise RequestError(f"{file} classifies the slots {slots}, but Shapes has {SLOTS}: train it anew")
            heads = tuple((saved.get_tensor(f"{slot}.weight").float(), saved.get_tensor(f"{slot}.bias").float())
                          for slot in SLOTS)
        return cls(heads, digest([file]))

    def __call__(self, features: Tensor) -> Tensor:
        """features (B, D) -> (B, 7) int64: the attributes seen."""
        return torch.stack([(features @ weight.T + bias).argmax(1) for weight, bias in self.heads], 1)


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    try:
        yield
    except UNLOADABLE as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{place} cannot be read as features: {first_lines(error)}. Copy or train it anew") from error


class ClipFeatures:
    """The unnormalised projections of a CLIPModel's folder, computed in float32."""

    def __init__(self, folder: Path | str, device: str | torch.device = "cpu") -> None:
        folder = _checked(Path(folder))
        self.device = device
        with _readable(folder):
            self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(device).eval().requires_grad_(False)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.id = digest([folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")])
        self.name = f"{'/'.join(folder.resolve().parts[-2:])}@{self.id[:12]}"
        self.dim = self.model.config.projection_dim
        self.size = self.model.config.vision_config.image_size
        self.resize = f"none at {self.size} px, else antialiased bicubic of the short side and a centre crop"
        mean, deviation = _normalisation(folder)
        if (mean, deviation) != HALVES:
            self.resize += f"; normalised by {mean} and {deviation}"
        self.mean, self.deviation = (torch.tensor(numbers, device=device)[:, None, None] for numbers in
                                     ([2 * m - 1 for m in mean], [2 * s for s in deviation]))       # of pixels in [-1, 1]
        self.attribute_classifier = AttributeClassifier.load(folder / "judge.safetensors") if (folder / "judge.safetensors").is_file() else None

    @torch.inference_mode()
    def images(self, pixels: Tensor) -> Tensor:
        pixels = (resized(pixels.to(self.device, torch.float32), self.size) - self.mean) / self.deviation
        return self.model.get_image_features(pixel_values=pixels).pooler_output.cpu()

    @torch.inference_mode()
    def texts(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        return self.model.get_text_features(**tokens).pooler_output.cpu()


class InceptionFeatures:
    """The 2048 pool features of the FID's InceptionV3, as torch-fidelity holds them: it resizes by itself."""

    name, dim, attribute_classifier = "inception", 2048, None
    id = "torch-fidelity inception-v3-compat 2048"
    resize = "bilinear to 299 px as TensorFlow 1 did it"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = device
        kind = _torch_fidelity()                           # by itself it would unpickle what it downloads, whatever that is
        self.model = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(_inception())).to(device).eval()

    @torch.inference_mode()
    def images(self, pixels: Tensor) -> Tensor:
        levels = ((pixels.to(self.device) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self.model(levels)[0].float().cpu()

    def texts(self, prompts: list[str]) -> None:
        return None


def dimensions(name: Path | str) -> int:
    """The width of the features that `load_features` would give, without their weights. RequestError as there."""
    if str(name) == "inception":
        _torch_fidelity()
        return InceptionFeatures.dim
    return CLIPConfig.from_pretrained(_checked(Path(name))).projection_dim


def load_features(name: Path | str, device: str | torch.device = "cpu") -> Features:
    """name: "inception", or the folder of a CLIPModel, with a judge.safetensors if attributes are to be classified."""
    return InceptionFeatures(device) if str(name) == "inception" else ClipFeatures(name, device)


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation, a channel each, of the pixels in [0, 1] that a CLIPModel reads; halves without its processor's file."""
    file = folder / "preprocessor_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return said.get("image_mean", HALVES[0]), said.get("image_std", HALVES[1])


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise RequestError(f"{folder} is no folder of a CLIPModel: it needs config.json and model.safetensors")
    foreign.check_folder(folder, [])
    return folder


def _torch_fidelity() -> type[torch.nn.Module]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise RequestError("features `inception` need torch-fidelity, which is not installed: "
                           "pip install 'stepdistill[fidelity]', or use a CLIPModel's folder") from error
    return FeatureExtractorInceptionV3


def _inception() -> Path:
    """The published weights in torch's cache, of the known sha256. They are the one file that is no safetensors; torch reads it with
    weights_only, which makes tensors and runs nothing."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rsplit("/", 1)[1]
    if not file.is_file() or not checksum(file).startswith(file.stem.rsplit("-", 1)[1]):
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION, str(file), hash_prefix=file.stem.rsplit("-", 1)[1], progress=False)
    return file


def resized(pixels: Tensor, size: int) -> Tensor:
    """The short side brought to `size`, the centre cut out: (B, 3, size, size). Pictures of that size pass
    untouched."""
    height, width = pixels.shape[-2:]
    if height == width == size:
        return pixels
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[..., top: top + size, left: left + size]


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean of 100 max(cos, 0) over pairs, Hessel et al. 2021, arXiv:2104.08718. (n, D), (n, D)."""
    return (100 * F.cosine_similarity(images, texts).clamp(min=0)).mean().item()


def digest(files: list[Path]) -> str:
    """sha256 of the bytes of the files that exist, in the order given."""
    hashed = hashlib.sha256()
    for file in files:
        if file.is_file():
            hashed.update(file.name.encode() + file.read_bytes())
    return hashed.hexdigest()
