"""Network families: what diffusers' pipelines have in common, and how a teacher is loaded.

A family is the quarantine for one kind of network: told times, conditions, latents and targets are translated in its
file, and nothing outside knows them.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...diffusion.contracts import Condition
from ...diffusion.schedule import Schedule
from ...errors import RequestError, gist

FAMILIES = {                                       # pipeline class -> module of this package
    "StableDiffusionPipeline": "unet2d_condition",
    "StableDiffusionXLPipeline": "unet2d_condition",
    "StableDiffusion3Pipeline": "sd3",
    "Toy": "toy",                                  # no pipeline of diffusers: a mixture in the plane, in closed form
}
SETTINGS = "stepdistill.json"                      # beside model_index.json


class Family(Protocol):
    """A loaded teacher and the conventions of its kind. The network is frozen and in evaluation mode."""

    name: str                                      # the module of this package
    source: str                                    # where the teacher was loaded from: folder, file or Hub id
    revision: str | None
    network: nn.Module
    schedule: Schedule
    kind: str                                      # what the network predicts, a key of PARAMETERISATIONS
    schedule_name: str                             # "vp" or "flow"
    scheduler: Any                                 # the teacher's own diffusers scheduler
    latent_shape: tuple[int, ...]                  # of one sample
    null_prompt: str
    default_targets: tuple[str, ...]               # LoRA targets
    feature_shapes: Mapping[str, tuple[int, int, int]]     # module that a discriminator may read -> its map's (C, H, W)
    default_features: tuple[str, ...]              # those that it reads unless told otherwise
    w_path: str | None                             # where a student told w has one more linear layer; None: nowhere
    w_features: tuple[int, int] | None             # that layer's input and output width
    call: Mapping[str, Any]                        # the keyword arguments that every call of its stock pipeline is given
    without: tuple[str, ...]                       # parts that from_pretrained of its class must be told to do without
    plane: bool                                    # whether samples are points of the plane rather than pictures
    seeded_steps: bool                             # whether a call's generator reaches the scheduler too

    def encode(self, prompts: list[str]) -> Condition: ...
    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def pixels(self, latents: Tensor) -> Tensor: ...
    def told_time(self, t: Tensor) -> Tensor: ...
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Condition | None) -> Tensor: ...
    def feature_map(self, output: Any, x_t: Tensor) -> Tensor: ...
    def fresh_network(self, state: Mapping[str, Tensor], told_w: bool = False) -> nn.Module: ...
    def pipeline(self, network: nn.Module | None = None, scheduler: Any = None) -> Any: ...
    def to(self, device: torch.device | str) -> Family: ...


@dataclass(frozen=True)
class Layout:
    """What is known of a family's pipelines before any weights are read.

    denoiser: its component's name; targets: of a LoRA, those that no network has included; schedule: like the teachers',
    and its name; feature_shapes, default_features: of a family, as a function of the network.
    inputs(networks by component, call, empty) -> what the denoiser is called with, the latents first, made by
    empty(*shape of one sample).
    """

    denoiser: str
    targets: tuple[str, ...]
    schedule: Schedule
    schedule_name: str
    feature_shapes: Callable[[nn.Module], dict[str, tuple[int, int, int]]]
    default_features: Callable[[nn.Module], tuple[str, ...]]
    inputs: Callable[[Mapping[str, nn.Module], Mapping[str, Any], Callable[..., Tensor]], dict[str, Any]]


def layout(class_name: str) -> Layout:
    """Of the pipelines of a class, a key of FAMILIES other than Toy, which has none."""
    return import_module(f".{FAMILIES[class_name]}", __package__).LAYOUT


def call_of(source: str) -> dict[str, Any]:
    """The keyword arguments that every call of a local pipeline is given, as its stepdistill.json says; {} without one.

    The file of an exported student says under "call" how the student samples; what its teacher's calls are given stands
    under "teacher_call".
    """
    path = Path(source) / SETTINGS
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return dict(said.get("teacher_call", {}) if "method" in said else said["call"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path} is damaged: it should hold {{\"call\": {{keyword: value}}}} for calls of the pipeline "
                           f"({type(error).__name__}: {error})") from error


def absent_parts(source: str, revision: str | None = None) -> dict[str, None]:
    """The parts that a pipeline folder or Hub id lists as null, for from_pretrained: it wants to be told them again where
    its class does not know them as optional."""
    from diffusers import DiffusionPipeline
    index = DiffusionPipeline.load_config(source, revision=revision)
    return {name: None for name, made_by in index.items() if isinstance(made_by, (list, tuple)) and made_by[0] is None}


def load_teacher(source: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Family:
    """Loads a diffusers pipeline: a folder, a Hub id (revision: branch, tag or commit), or one .safetensors file.

    dtype: of the network, the text encoders and the codec, torch.float32 or torch.bfloat16. RequestError, before any
    weights are read, for what is missing, damaged or of an unsupported class.
    """
    source = str(source)
    if dtype not in (torch.float32, torch.bfloat16):
        raise RequestError(f"a teacher is loaded in float32 or bfloat16, not in {dtype}: codecs overflow in float16")
    path = Path(source)
    if path.is_file():
        class_name = _class_of_file(path)
    elif path.is_dir():
        class_name = _class_of_folder(path)
    else:
        class_name = _class_on_hub(source, revision)
    if class_name not in FAMILIES:
        raise RequestError(f"{source} is a {class_name}, which has no family here yet; supported are {', '.join(FAMILIES)}")
    if path.is_dir():
        for file in sorted(path.rglob("*.safetensors")):
            _check_safetensors(file)
    return import_module(f".{FAMILIES[class_name]}", __package__).load(source, class_name, revision, dtype)


def _class_of_folder(folder: Path) -> str:
    index = folder / "model_index.json"
    if not index.is_file():
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise RequestError(f"{folder} is no diffusers pipeline: it has no model_index.json (it holds {held}). "
                           "A teacher is a folder that `pipeline.save_pretrained` wrote")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        class_name = parts["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{index} is damaged, it names no pipeline class ({error}): save or download the teacher anew") from error
    missing = [name for name, made_by in parts.items() if isinstance(made_by, list) and made_by[0] is not None
               and name != "safety_checker" and not (folder / name).is_dir()]
    if missing:
        raise RequestError(f"{folder} is not complete: its model_index.json lists {', '.join(missing)}, but there is no such "
                           "folder beside it; save or download the teacher anew")
    return class_name


def _class_of_file(file: Path) -> str:
    """Of the checkpoints in one file, SDXL's hold a second text encoder under this name."""
    if file.suffix != ".safetensors":
        raise RequestError(f"{file} is no .safetensors file: a teacher is a folder, a Hub id or one .safetensors file")
    keys = _check_safetensors(file)
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise RequestError(f"{file} holds no whole Stable Diffusion checkpoint: no tensor's name begins with "
                           f"model.diffusion_model. (the first is {keys[0] if keys else 'missing'})")
    if any(key.startswith("model.diffusion_model.joint_blocks.") for key in keys):
        raise RequestError(f"{file} is a Stable Diffusion 3 in one file, which may or may not hold its text encoders: give its "
                           "pipeline as a folder or a Hub id, such as stabilityai/stable-diffusion-3-medium-diffusers")
    xl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    return "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"


def _class_on_hub(source: str, revision: str | None) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith(".") or Path(source).parent.is_dir():
        raise RequestError(f"there is no folder or file {source} (looked in {Path.cwd()}): a teacher is a pipeline folder, "
                           "a Hub id such as owner/name, or one .safetensors file")
    from diffusers import DiffusionPipeline
    try:
        return DiffusionPipeline.load_config(source, revision=revision)["_class_name"]
    except (OSError, ValueError) as error:
        reason = gist(error)
        raise RequestError(f"there is no folder {source} here, and the Hub did not supply such a pipeline: {reason}") from error


def _check_safetensors(file: Path) -> list[str]:
    """The names of its tensors. Reads the header only, which also tells how long the file must be."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise RequestError(f"{file} is damaged or cut short ({error}; it has {file.stat().st_size:,} bytes): "
                           "copy or download it anew") from error
