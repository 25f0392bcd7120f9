"""The dtypes in which weights leave. Values are rounded first, and what is proved is the rounded student."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..errors import RequestError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DEFAULTS = {"lora": "float16", "comfyui": "float16", "pipeline": "float32"}
"""Half precision costs a LoRA little. A merged weight it costs what training changed by less than half a unit in the
last place of the weight. So a pipeline keeps float32 unless it is asked for less."""


def chosen(dtype: str | None, to: str) -> str:
    """The name of the dtype for the form `to`, its default unless given. RequestError for another name."""
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"there is no --dtype {dtype}; there are {', '.join(DTYPES)} "
                           f"(default of --to {to}: {DEFAULTS[to]})")
    return dtype or DEFAULTS[to]


def rounded(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same weights in dtype. RequestError where a finite one has no finite neighbour there."""
    found = {key: value.to(dtype) for key, value in state.items()}
    if beyond := [key for key, value in found.items() if not value.isfinite().all() and state[key].isfinite().all()]:
        first, most = beyond[0], torch.finfo(dtype).max
        raise RequestError(f"{len(beyond)} tensors hold values beyond {dtype} (at most {most:g}), first {first} with "
                           f"{state[first].abs().max():g}: use --dtype bfloat16, which has float32's range, or float32")
    return found


@torch.no_grad()
def round_(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives the weights of a float32 module the values that they have in dtype. They stay float32.

    RequestError as `rounded`."""
    own = {key: value for key, value in module.state_dict().items() if value.is_floating_point()}
    for key, value in rounded(own, dtype).items():
        own[key].copy_(value)


def save_pipeline(pipe: DiffusionPipeline, folder: str | Path, dtype: torch.dtype) -> None:
    """Writes a float32 pipeline in one dtype, so that a plain stock call runs it in float32. `pipe` stays float32.

    A stock `from_pretrained` makes the networks of diffusers float32, whatever their files hold, and those of
    transformers what their config.json says under "dtype". Both must agree, or the call fails ("Half and Float").
    """
    for module in _modules(pipe):
        module.to(dtype)
    pipe.save_pretrained(folder)
    for module in _modules(pipe):
        module.to(torch.float32)
    for path in Path(folder).glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "dtype" in config:
            config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def round_pipeline_(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    """`round_` of every network of a pipeline, text encoders and codec among them."""
    for module in _modules(pipe):
        round_(module, dtype)


def _modules(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]
