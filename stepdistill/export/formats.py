"""The three forms in which a student leaves. Each writer fills a folder from a student and pipeline as they leave
(`leaving.Leaving`) and returns the name of its weights file."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..errors import RequestError
from .dtypes import save_pipeline
from .fold import folded
from .student import Lora, Student


def component(pipe: DiffusionPipeline) -> str:
    """The name of the denoiser among the pipeline's components."""
    return next(name for name in ("unet", "transformer") if name in pipe.components)


def write_lora(student: Student, pipe: DiffusionPipeline, dtype: torch.dtype, folder: Path) -> str:
    lora, name = student.lora, component(pipe)
    layers = {key: value.contiguous() for key, value in lora.state.items()}
    pipe.save_lora_weights(folder, **{f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": lora.metadata()})
    return "pytorch_lora_weights.safetensors"


def write_comfyui(student: Student, pipe: DiffusionPipeline, dtype: torch.dtype, folder: Path) -> str:
    """kohya's keys on diffusers' module names, which ComfyUI, AUTOMATIC1111 and diffusers itself read."""
    weights = f"{student.method}-{student.steps}step.safetensors"
    pipe.write_lora_layers(kohya(student.lora), folder, is_main_process=True, weight_name=weights, save_function=None,
                           safe_serialization=True)
    return weights


def write_pipeline(student: Student, pipe: DiffusionPipeline, dtype: torch.dtype, folder: Path) -> str:
    """The whole pipeline, an adapter merged into its network; a told student keeps reading its scale."""
    save_pipeline(pipe, folder, dtype)
    return f"{component(pipe)}/diffusion_pytorch_model.safetensors"


WRITERS: dict[str, Callable[[Student, DiffusionPipeline, torch.dtype, Path], str]] = {
    "lora": write_lora, "pipeline": write_pipeline, "comfyui": write_comfyui}


def adapter(student: Student, base: DiffusionPipeline, guidance: float | None, to: str) -> Lora:
    """The student as an adapter on the stock denoiser, its guidance folded in if it was told."""
    if student.lora is None:
        raise RequestError(f"this student trained all its weights, so it cannot leave as --to {to}; use --to pipeline")
    if to == "comfyui" and component(base) != "unet":
        raise RequestError(f"kohya's LoRA keys are written for UNets; {type(base).__name__} has a transformer: "
                           "use --to lora, which ComfyUI reads for transformers")
    if student.cond_proj is None:
        return student.lora
    if guidance is None:
        raise RequestError(f"this student is told its guidance scale and a LoRA holds one: add --guidance W"
                           f"{_trained(student)}, or use --to pipeline, which keeps the choice")
    told = torch.arange(student.scheduler.config["num_train_timesteps"])
    return folded(student.lora, student.cond_proj, embedding(base, guidance, student.cond_proj.shape[1]), base.unet, told)


def embedding(pipe: DiffusionPipeline, guidance: float, dim: int) -> Tensor:
    """The scale as the stock pipeline tells it: (dim,), sinusoids of w - 1."""
    return pipe.get_guidance_scale_embedding(torch.tensor([guidance - 1.0]), embedding_dim=dim)[0]


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


def _trained(student: Student) -> str:
    return "" if student.guidance is None else f" (it was trained at {student.guidance})"
