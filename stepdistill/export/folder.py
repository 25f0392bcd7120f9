"""An export folder as its user meets it: read what it says, and make a stock pipeline sample as it says."""
from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..errors import RequestError, first_lines
from ..models.adapters import load_adapter, take_off
from ..models.teacher import SETTINGS, absent_parts
from .formats import component, loads_loras


def read_settings(folder: str | Path) -> dict[str, Any]:
    """stepdistill.json of an export folder. RequestError if there is none or it cannot be read."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise RequestError(f"{folder} is no export folder: it holds no {SETTINGS}; "
                           "`stepdistill export RUN --to lora` makes one")
    settings = _parsed(path)
    if "method" not in settings:
        raise RequestError(f"{folder} is no export folder: its {SETTINGS} names no method, so it is a teacher's; "
                           "`stepdistill export RUN --to lora` makes one")
    return settings


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, rather than a teacher whose stepdistill.json says what every call of it is
    given."""
    path = folder / SETTINGS
    return path.is_file() and (not (folder / "model_index.json").is_file() or "method" in _parsed(path))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path} is not valid JSON ({error}): export again") from error


def load(pipe: DiffusionPipeline, folder: str | Path, adapter_name: str = "student") -> dict[str, Any]:
    """Makes `pipe` sample as the student in `folder`, and returns the keyword arguments to call it with:

        settings = stepdistill.load(pipe, folder)
        image = pipe(prompt, **settings).images[0]

    A LoRA is loaded as `adapter_name`, so that `set_adapters`, `fuse_lora` and `unload_lora_weights` work on it, where the
    pipeline has them; a whole pipeline lends its denoiser. The scheduler is replaced by the folder's. RequestError if the
    student does not fit.
    """
    settings = read_settings(folder)
    if settings["format"] == "pipeline":
        _replace_denoiser(pipe, folder, settings)
    else:
        _load_lora(pipe, folder, settings, adapter_name)
    pipe.scheduler = read_scheduler(folder)
    return dict(settings["call"])


def open_export(folder: str | Path, teacher: str | Path | None = None,
                fused: bool = True) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """(a fresh stock pipeline in float32 that samples as the folder says, the settings to call it with).

    teacher: where the base pipeline lies now, if not where the folder says. fused: a LoRA is added to the weights, so
    that a call costs what one of the base does; otherwise it lies beside them.
    """
    settings = read_settings(folder)
    cls = getattr(diffusers, settings["pipeline"])
    if settings["format"] == "pipeline":
        return fresh_pipeline(cls, str(folder), None), dict(settings["call"])
    pipe = fresh_pipeline(cls, str(teacher or settings["teacher"]), settings["revision"])
    call = load(pipe, folder)
    if fused:
        fuse(pipe)
    return pipe, call


def fuse(pipe: DiffusionPipeline) -> None:
    """Adds the loaded LoRA to the denoiser's weights and removes its layers: the pipeline is a plain one then."""
    if not loads_loras(pipe):
        take_off(pipe.components[component(pipe)], merge=True)
        return
    pipe.fuse_lora(components=[component(pipe)])
    pipe.unload_lora_weights()


def fresh_pipeline(cls: type[DiffusionPipeline], source: str, revision: str | None) -> DiffusionPipeline:
    """The stock pipeline in a folder, at a Hub id or in one .safetensors file; float32, silent."""
    try:
        if source.endswith(".safetensors"):
            pipe = cls.from_single_file(source, dtype=torch.float32)
        else:
            pipe = cls.from_pretrained(source, revision=revision, dtype=torch.float32, **absent_parts(source, revision))
    except OSError as error:
        raise RequestError(f"the base pipeline {source} cannot be loaded: {first_lines(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float32)                     # earlier diffusers do not know `dtype`


def read_scheduler(folder: str | Path) -> diffusers.SchedulerMixin:
    name = json.loads((Path(folder) / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Collects, instead of printing them, the warnings of diffusers and peft: about missing and unexpected keys they
    raise nothing. Those of diffusers also where it is kept silent, as the commands keep it."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())      # type: ignore[method-assign]
    logger = logging.getLogger("diffusers")
    before, level = logger.handlers, logger.level
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield messages
    finally:
        logger.handlers = before
        logger.setLevel(level)
        messages += [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]


def _load_lora(pipe: DiffusionPipeline, folder: str | Path, settings: dict[str, Any], adapter_name: str) -> None:
    network = pipe.components[component(pipe)]
    refusal = f"the LoRA in {folder}, made for {settings['teacher']}, does not fit this {type(pipe).__name__}"
    try:
        if not loads_loras(pipe):
            if wrong := load_adapter(network, folder, adapter_name):
                raise ValueError("; ".join(wrong))
            return
        with complaints() as messages:
            pipe.load_lora_weights(folder, weight_name=settings["weights"], adapter_name=adapter_name)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise RequestError(f"{refusal}: {first_lines(error)}") from error
    # an encoder without a LoRA is no fault
    other = re.compile(rf"No LoRA keys associated to (?!{type(network).__name__})")
    if messages := [line for line in messages if not other.match(line)]:
        network.delete_adapters(adapter_name)
        raise RequestError(f"{refusal}: {' '.join(messages)[:500]}")


def _replace_denoiser(pipe: DiffusionPipeline, folder: str | Path, settings: dict[str, Any]) -> None:
    name = component(pipe)
    old = pipe.components[name]
    new = type(old).from_pretrained(folder, subfolder=name, dtype=old.dtype).to(old.device, old.dtype)
    shapes = [{key: tuple(value.shape) for key, value in network.state_dict().items() if "cond_proj" not in key}
              for network in (old, new)]
    differing = sorted(key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key))
    if differing:
        raise RequestError(f"the {name} in {folder}, made for {settings['teacher']}, does not fit this "
                           f"{type(pipe).__name__}: "
                           f"{len(differing)} weights differ in shape, first {differing[0]} "
                           f"({shapes[0].get(differing[0])} here, {shapes[1].get(differing[0])} there)")
    pipe.register_modules(**{name: new})
