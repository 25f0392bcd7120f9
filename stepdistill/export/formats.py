"""The three forms in which a student leaves. Each writer fills a folder from a student and pipeline as they leave
(`prepare.PreparedExport`) and returns the name of its weights file."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor

from ..errors import RequestError
from ..models.adapters import save_adapter
from ..models.sources import LORA_FILE
from .dtypes import save_pipeline
from .fold import folded
from .layers import NAMES, named
from .student import Lora, Student

if TYPE_CHECKING:
    from ..models.families import Family

Call = Mapping[str, Any]
Trained = float | tuple[float, float] | None


def component(pipe: DiffusionPipeline) -> str:
    """The name of the denoiser among the pipeline's components."""
    return next(name for name in ("unet", "transformer") if name in pipe.components)


def loads_loras(pipe: DiffusionPipeline) -> bool:
    """Whether it loads LoRAs by itself. Where it does not, peft puts them on its network."""
    return isinstance(pipe, LoraBaseMixin)


def write_lora(student: Student, pipe: DiffusionPipeline, dtype: torch.dtype, folder: Path) -> str:
    return save_lora(student.lora, type(pipe), component(pipe), folder)


def save_lora(lora: Lora, cls: type[DiffusionPipeline], denoiser: str, folder: Path) -> str:
    """A LoRA of a pipeline's network in diffusers' format, in peft's where its class loads none by itself."""
    if not issubclass(cls, LoraBaseMixin):
        return save_adapter(folder, lora.state, lora.metadata())
    layers = {key: value.contiguous() for key, value in lora.state.items()}
    cls.save_lora_weights(folder, **{f"{denoiser}_lora_layers": layers,
                                     f"{denoiser}_lora_adapter_metadata": lora.metadata()})
    return LORA_FILE


def write_comfyui(student: Student, pipe: DiffusionPipeline, dtype: torch.dtype, folder: Path) -> str:
    """Of a UNet kohya's keys on diffusers' module names, which ComfyUI, AUTOMATIC1111 and diffusers itself read; of a
    transformer those that ComfyUI and diffusers read, see `layers`."""
    names = NAMES.get(student.teacher.family.name)
    if names is not None and not loads_loras(pipe):
        return save_adapter(folder, student.lora.state, student.lora.metadata())
    state = kohya(student.lora) if names is None else named(student.lora, names)
    config = None if names is None else {f"{component(pipe)}.{name}": value
                                         for name, value in student.lora.metadata().items()}
    weights = f"{student.method}-{student.steps}step.safetensors"
    pipe.write_lora_layers(state, folder, is_main_process=True, weight_name=weights, save_function=None,
                           safe_serialization=True,
                           lora_adapter_metadata=config)
    return weights


def write_pipeline(student: Student, pipe: DiffusionPipeline, dtype: torch.dtype, folder: Path) -> str:
    """The whole pipeline, an adapter merged into its network. A student keeps reading the numbers that its class has an
    input for."""
    save_pipeline(pipe, folder, dtype)
    return f"{component(pipe)}/diffusion_pytorch_model.safetensors"


WRITERS: dict[str, Callable[[Student, DiffusionPipeline, torch.dtype, Path], str]] = {
    "lora": write_lora, "pipeline": write_pipeline, "comfyui": write_comfyui}


def check(to: str, guidance: float | None, family: Family, reads: tuple[str, ...], lora: bool,
          trained: Trained, quantization: str | None = None) -> None:
    """RequestError for an export that cannot be, known before anything is loaded.

    reads: the numbers that the student reads beside its time; lora: whether it is an adapter; trained: the scale or the
    range of scales that it was trained at; quantization: of its base.
    """
    if family.no_pipeline is not None:
        raise RequestError(family.no_pipeline)
    if to not in WRITERS:
        raise RequestError(f"there is no export --to {to}; there are {', '.join(WRITERS)}")
    if to == "comfyui" and family.denoiser != "unet" and family.name not in NAMES:
        raise RequestError(f"ComfyUI's core loads no network of the family {family.name}; it loads UNets and "
                           f"{', '.join(NAMES)}: use --to lora")
    if to == "comfyui" and family.prompts.keyword != "prompt":
        raise RequestError(f"ComfyUI draws pictures of texts, and a network of the family {family.name} reads none: "
                           "use --to lora or --to pipeline")
    if to == "pipeline" and quantization is not None:
        raise RequestError(f"this student's base is quantised ({quantization}), and the sum of a weight and a LoRA "
                           "would be rounded to few bits: use --to lora, which is loaded beside the quantised base, or "
                           "the whole one")
    if to != "pipeline" and not lora:
        raise RequestError(f"this student trained all its weights, so it cannot leave as --to {to}; use --to pipeline")
    if "w" not in reads and guidance is not None:
        raise RequestError(f"--guidance {guidance:g} chooses the scale of a student with a guidance embedding; this "
                           "student has none: "
                           "leave --guidance out")
    if "w" in reads and guidance is None and not keeps(to, family, reads) and not isinstance(trained, (int, float)):
        instead = ", or use --to pipeline, which keeps the choice" if keeps("pipeline", family, reads) else ""
        raise RequestError("this student has a guidance embedding, and its weights can hold one scale: add --guidance "
                           "W"
                           f"{'' if trained is None else f' (it was trained at {trained})'}{instead}")
    if guidance is not None and isinstance(trained, (tuple, list)) and not trained[0] <= guidance <= trained[1]:
        raise RequestError(f"--guidance {guidance:g} is outside what this student was trained for: choose from "
                           f"{trained[0]:g} to {trained[1]:g}")
    if guidance is not None and isinstance(trained, (int, float)) and guidance != trained:
        raise RequestError(f"--guidance {guidance:g} is not what this student was trained for: it has seen the scale "
                           f"{trained:g} alone. Leave --guidance out, or train it with a range, such as guidance: "
                           f"[1, {max(trained, 2):g}]")


def keeps(to: str, family: Family, reads: tuple[str, ...]) -> bool:
    """Whether an export leaves the guidance scale of a student with a guidance embedding to the call: its class must
    have an input for it, and for all else that the student reads."""
    return to == "pipeline" and "w" in reads and not family.time.own(reads)


def adapter(to: str, student: Student, call: Call, guidance: float | None) -> Lora:
    """The student as an adapter on the stock denoiser, the numbers that it reads folded in; for the form `to`."""
    lora = folded(student, student.sampler(call), guidance) if student.reads else student.lora
    return lora.unscaled() if to == "comfyui" and student.teacher.family.name in NAMES else lora


def kohya(lora: Lora) -> dict[str, Tensor]:
    """lora_unet_<module with underscores>.{lora_down.weight, lora_up.weight, alpha}, where scaling = alpha / rank."""
    state: dict[str, Tensor] = {}
    for module in lora.modules:
        name = "lora_unet_" + module.replace(".", "_")
        down, up = lora.state[f"{module}.lora_A.weight"], lora.state[f"{module}.lora_B.weight"]
        state[f"{name}.lora_down.weight"] = down.contiguous()
        state[f"{name}.lora_up.weight"] = up.contiguous()
        state[f"{name}.alpha"] = torch.tensor(lora.scaling(module) * len(down), dtype=torch.float32)
    return state

