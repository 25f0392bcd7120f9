"""Where a teacher lies, and which class of pipeline it is: a folder, one .safetensors file, or a Hub id. No weights are
read."""
from __future__ import annotations

import json
import re
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from ..errors import RequestError, first_lines


def class_at(source: str, revision: str | None = None) -> str:
    """The class of a pipeline. RequestError for what is none."""
    path = Path(source)
    return _class_of_file(path) if path.is_file() else _class_of_folder(path) if path.is_dir() else _class_on_hub(source, revision)


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
        raise RequestError(f"{index} is damaged, it names no pipeline class ({error}): save or download the teacher "
                           "anew") from error
    missing = [name for name, made_by in parts.items() if isinstance(made_by, list) and made_by[0] is not None
               and name != "safety_checker" and not (folder / name).is_dir()]
    if missing:
        raise RequestError(f"{folder} is not complete: its model_index.json lists {', '.join(missing)}, but there is "
                           "no such "
                           "folder beside it; save or download the teacher anew")
    return class_name


def _class_of_file(file: Path) -> str:
    """Of the checkpoints in one file, SDXL's hold a second text encoder under this name."""
    if file.suffix != ".safetensors":
        raise RequestError(f"{file} is no .safetensors file: a teacher is a folder, a Hub id or one .safetensors file")
    keys = check_safetensors(file)
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise RequestError(f"{file} holds no whole Stable Diffusion checkpoint: no tensor's name begins with "
                           f"model.diffusion_model. (the first is {keys[0] if keys else 'missing'})")
    if any(key.startswith("model.diffusion_model.joint_blocks.") for key in keys):
        raise RequestError(f"{file} is a Stable Diffusion 3 in one file, which may or may not hold its text encoders: "
                           "give its "
                           "pipeline as a folder or a Hub id, such as stabilityai/stable-diffusion-3-medium-diffusers")
    xl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    return "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"


def _class_on_hub(source: str, revision: str | None) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith(".") or Path(source).parent.is_dir():
        raise RequestError(f"there is no folder or file {source} (looked in {Path.cwd()}): a teacher is a pipeline "
                           "folder, "
                           "a Hub id such as owner/name, or one .safetensors file")
    try:
        return DiffusionPipeline.load_config(source, revision=revision)["_class_name"]
    except (OSError, ValueError) as error:
        reason = first_lines(error)
        raise RequestError(f"there is no folder {source} here, and the Hub did not supply such a pipeline: {reason}") from error


def check_safetensors(file: Path) -> list[str]:
    """The names of its tensors. Reads the header only, which also tells how long the file must be."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise RequestError(f"{file} is damaged or cut short ({error}; it has {file.stat().st_size:,} bytes): "
                           "copy or download it anew") from error
