"""Features of pictures: of CLIP with the attribute classifier on top, of DINOv2, of InceptionV3, or of a module of
one's own."""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, CLIPModel, CLIPTokenizer, PretrainedConfig

from ..data.shapes import SLOTS
from ..errors import RequestError
from ..files import foreign
from ..files.whole import checksum
from ..models.reading import JUDGE, AttributeClassifier, Reading, digest, preprocessor, readable

# named by its sha256
INCEPTION = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
             "weights-inception-2015-12-05-6726825d.pth")
TEXTS = 250                       # prompts read at a time


class Features(Protocol):
    """A feature space. name tells users what it is, id (a hash of its weights) and resize enter the protocol. clip:
    whether it is CLIP's."""

    name: str
    id: str
    dim: int
    resize: str
    clip: bool
    attribute_classifier: AttributeClassifier | None

    def images(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> (B, dim) float32 on the CPU."""

    def texts(self, prompts: list[str]) -> Tensor | None:
        """(B, dim) float32 on the CPU; None where the space knows no text."""


class ClipFeatures:
    """The unnormalised projections of a CLIPModel's folder, computed in float32."""

    clip = True

    def __init__(self, folder: Path | str, device: str | torch.device = "cpu") -> None:
        folder = _checked(Path(folder))
        self.device = device
        with readable(folder):
            self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32,
                                                   use_safetensors=True).to(device).eval().requires_grad_(False)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.id = digest([folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")])
        self.name = f"{'/'.join(folder.resolve().parts[-2:])}@{self.id[:12]}"
        self.dim = self.model.config.projection_dim
        self.size = self.model.config.vision_config.image_size
        self.read = Reading(folder, self.size, device)
        self.resize = self.read.name
        self.attribute_classifier = (AttributeClassifier.load(folder / JUDGE, SLOTS) if (folder / JUDGE).is_file()
                                     else None)

    @torch.inference_mode()
    def images(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=self.read(pixels)).pooler_output.cpu()

    @torch.inference_mode()
    def texts(self, prompts: list[str]) -> Tensor:
        found = []
        for first in range(0, len(prompts), TEXTS):
            tokens = self.tokenizer(prompts[first: first + TEXTS], padding="max_length", truncation=True,
                                    return_tensors="pt").to(self.device)
            found.append(self.model.get_text_features(**tokens).pooler_output.cpu())
        return torch.cat(found)


class DinoFeatures:
    """The class token of DINOv2 (Oquab et al. 2023, arXiv:2304.07193), of the folder of a Dinov2Model, in float32.

    Stein et al. 2023, arXiv:2306.04675, find that distances in it agree best with people's judgement.
    """

    clip, attribute_classifier = False, None

    def __init__(self, folder: Path | str, device: str | torch.device = "cpu") -> None:
        folder = _checked(Path(folder))
        with readable(folder):
            self.model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True,
                                                   trust_remote_code=False).to(device).eval().requires_grad_(False)
        self.id = digest([folder / name for name in ("config.json", "model.safetensors")])
        self.name, self.dim = f"{'/'.join(folder.resolve().parts[-2:])}@{self.id[:12]}", self.model.config.hidden_size
        self.read = Reading(folder, _crop(folder, self.model.config.image_size), device)
        self.resize = self.read.name

    @torch.inference_mode()
    def images(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=self.read(pixels)).pooler_output.cpu()

    def texts(self, prompts: list[str]) -> None:
        return None


class ModuleFeatures:
    """Of any module that turns pixels (B, 3, H, W) in [-1, 1] into (B, dim), in its own dtype and on its own device.

    name: what tables call it. Its id is a hash of its class and weights; it resizes by itself.
    """

    clip, attribute_classifier, resize = False, None, "the module's own"

    def __init__(self, module: torch.nn.Module, name: str | None = None) -> None:
        self.module = module.eval()
        weights = sorted(module.state_dict().items())
        hashed = hashlib.sha256(type(module).__qualname__.encode())
        for key, tensor in weights:
            hashed.update(key.encode()
                          + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.id = hashed.hexdigest()
        self.name = f"{name or type(module).__name__}@{self.id[:12]}"
        self.dim = self.images(torch.zeros(2, 3, 32, 32)).shape[1]

    @torch.inference_mode()
    def images(self, pixels: Tensor) -> Tensor:
        like = next(self.module.parameters(), pixels)
        found = self.module(pixels.to(like.device, like.dtype))
        if found.ndim != 2 or len(found) != len(pixels):
            raise RequestError(f"the features {type(self.module).__name__} gave {tuple(found.shape)} for {len(pixels)} "
                               f"pictures: wanted ({len(pixels)}, dim)")
        return found.float().cpu()

    def texts(self, prompts: list[str]) -> None:
        return None


class InceptionFeatures:
    """The 2048 pool features of the FID's InceptionV3, as torch-fidelity holds them: it resizes by itself."""

    name, dim, clip, attribute_classifier = "inception", 2048, False, None
    id = "torch-fidelity inception-v3-compat 2048"
    resize = "bilinear to 299 px as TensorFlow 1 did it"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = device
        # by itself it would unpickle what it downloads, whatever that is
        kind = _torch_fidelity()
        self.model = kind("inception-v3-compat", ["2048"],
                          feature_extractor_weights_path=str(_inception())).to(device).eval()

    @torch.inference_mode()
    def images(self, pixels: Tensor) -> Tensor:
        levels = ((pixels.to(self.device) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self.model(levels)[0].float().cpu()

    def texts(self, prompts: list[str]) -> None:
        return None


DINO = ("dinov2", "dinov2_with_registers")


def dimensions(name: Path | str | torch.nn.Module) -> int:
    """The width of the features that `load_features` would give, without their weights. RequestError as there."""
    if isinstance(name, torch.nn.Module):
        return ModuleFeatures(name).dim
    if str(name) == "inception":
        _torch_fidelity()
        return InceptionFeatures.dim
    config = _config(Path(name))
    return config.projection_dim if config.model_type == "clip" else config.hidden_size


def load_features(name: Path | str | torch.nn.Module, device: str | torch.device = "cpu") -> Features:
    """name: "inception"; the folder of a CLIPModel, with a judge.safetensors if attributes are to be classified; the
    folder of a Dinov2Model; or a module of one's own, see ModuleFeatures."""
    if isinstance(name, torch.nn.Module):
        return ModuleFeatures(name)
    if str(name) == "inception":
        return InceptionFeatures(device)
    return (ClipFeatures if _config(Path(name)).model_type == "clip" else DinoFeatures)(name, device)


def _crop(folder: Path, size: int) -> int:
    """The side of the square that a model's processor cuts out; `size`, that of its own grid, without the processor's
    file."""
    return preprocessor(folder).get("crop_size", {}).get("height", size)


def _config(folder: Path) -> PretrainedConfig:
    with readable(_checked(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type not in ("clip", *DINO):
        raise RequestError(f"{folder} is a {config.model_type}; features are of a CLIPModel or a Dinov2Model, or "
                           "`inception`")
    return config


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise RequestError(f"{folder} is no folder of a CLIPModel or a Dinov2Model: it needs config.json and "
                           "model.safetensors")
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
    """The published weights in torch's cache, of the known sha256. They are the one file that is no safetensors; torch
    reads it with weights_only, which makes tensors and runs nothing."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rsplit("/", 1)[1]
    if not file.is_file() or not checksum(file).startswith(file.stem.rsplit("-", 1)[1]):
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION, str(file), hash_prefix=file.stem.rsplit("-", 1)[1], progress=False)
    return file
