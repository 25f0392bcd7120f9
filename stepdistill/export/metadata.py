"""What a LoRA's file says of itself where it is listed: by AUTOMATIC1111, ComfyUI and sites of models.

The keys `modelspec.*` are those of Stability AI's Model Metadata Standard, 1.0.0; those with `ss_` are kohya's, of
which AUTOMATIC1111 reads the base's version and the name.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .. import resources
from .student import UNKNOWN, Student

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
ARCHITECTURES = {                                  # class of pipeline -> (architecture, kohya's version of the base)
    "StableDiffusionXLPipeline": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "StableDiffusion3Pipeline": ("stable-diffusion-3", None),
    "FluxPipeline": ("flux-1-dev", "flux1"),
}
WIDTHS = {768: "v1", 1024: "v2"}                   # of the text that a Stable Diffusion 1 or 2 reads


def described(student: Student, pipeline: type[DiffusionPipeline], weights: str, scale: float | None) -> dict[str, str]:
    """The entries of a LoRA's file. weights: its name; scale: of a student with a guidance embedding."""
    base = resources.named((student.base_model or student.teacher.source).base)
    architecture, version = _architecture(student, pipeline.__name__)
    prediction = student.scheduler.config.get("prediction_type")
    guided = student.teacher.guidance.scale(student.call) if scale is None else 1.0
    hint = (f"{student.steps} step{'s' * (student.steps != 1)} of {type(student.scheduler).__name__}, "
            + (f"made for the guidance scale {scale:g}, " if scale is not None else "")
            + (f"classifier-free guidance {guided:g}" if guided > 1 else "classifier-free guidance off"))
    made = "its call found" if student.method == UNKNOWN else f"trained with {student.method}"
    found: dict[str, Any] = {
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{Path(base).name} {student.method}, {student.steps} steps",
        "modelspec.description": f"A LoRA that makes {base} sample in few steps, {made} by stepdistill.",
        "modelspec.usage_hint": hint, "modelspec.tags": f"distillation, few-step, {student.method}",
        "modelspec.prediction_type": PREDICTIONS.get(prediction),
        "ss_base_model_version": version, "ss_v2": None if version is None else str(version.startswith("sd_v2")),
        "ss_sd_model_name": base, "ss_output_name": weights.removesuffix(".safetensors"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": student.lora.rank, "ss_network_alpha": f"{student.lora.alpha:g}", "ss_steps": student.step,
        "ss_training_comment": hint,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _architecture(student: Student, pipeline: str) -> tuple[str, str | None]:
    if pipeline in ARCHITECTURES:
        return ARCHITECTURES[pipeline]
    if pipeline != "StableDiffusionPipeline":
        return student.teacher.family.name, None
    version, v = WIDTHS.get(student.teacher.network.config.cross_attention_dim), student.teacher.kind == "v"
    if version is None:
        return "stable-diffusion", None            # of a width that none of those that are known has
    return (f"stable-diffusion-{version}" + {"v1": "", "v2": "-768-v" if v else "-512"}[version],
            f"sd_{version}" + "_v" * v)


def stamp(file: Path, entries: Mapping[str, str]) -> None:
    """Adds entries to the metadata of a safetensors file, and the hash of its tensors. The library leaves the order of
    entries to chance: here they are sorted, so that the same export is the same file."""
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header, tensors = json.loads(whole[8:begin]), whole[begin:]
    said = (header.pop("__metadata__", {}) | entries
            | {"modelspec.hash_sha256": f"0x{hashlib.sha256(tensors).hexdigest()}"})
    text = json.dumps({"__metadata__": dict(sorted(said.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                # tensors begin at a multiple of 8
    file.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
