"""An export folder as its user meets it: read what it says, and make a stock pipeline sample as it says."""
from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import CMStochasticIterativeScheduler, DiffusionPipeline, SchedulerMixin
from safetensors import safe_open
from torch import Tensor

from ..errors import RequestError, first_lines
from ..files import foreign, records
from ..files.whole import checksum
from ..models.adapters import (
    activate,
    active_adapters,
    adapter_names,
    adapter_state,
    drop_adapter,
    load_adapter,
    take_off,
)
from ..models.families import family_of
from ..models.fused import complaints, traces_of
from ..models.loading import read_pipeline
from ..models.quantized import quantization_of
from ..models.schedulers import LAW, is_flow
from ..models.sources import (
    SAMPLING,
    SETTINGS,
    SHAPING,
    UNLOADABLE,
    FusedLora,
    Source,
    absent_parts,
    check_safetensors,
    index_at,
)
from ..models.weights import pipeline_class, scheduler_class, settled
from .formats import component, loads_loras
from .layers import NAMES, Names

AGAIN, MOST = "Export again with `stepdistill export RUN`", 1000         # steps
PARTS = tuple(f.name for f in fields(Source) if f.name not in ("base", "revision", "loras"))
log = logging.getLogger("stepdistill")

def read_settings(folder: str | Path) -> dict[str, Any]:
    """stepdistill.json of an export folder. RequestError if there is none or it cannot be read."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise RequestError(f"{folder} is no export folder: it holds no {SETTINGS}; "
                           "`stepdistill export RUN --to lora` makes one")
    if "method" not in records.read(path, dict[str, Any], AGAIN):
        raise RequestError(f"{folder} is no export folder: its {SETTINGS} names no method, so it is a teacher's; "
                           "`stepdistill export RUN --to lora` makes one")
    settings = records.read(path, records.Export, AGAIN)
    foreign.check_folder(Path(folder))
    for part in settings["weights"].split("/"):              # a whole pipeline's lie in a folder of its own
        foreign.plain(part, Path(folder))
    _check_call(path, settings)
    return settings


def _check_call(path: Path, settings: Mapping[str, Any]) -> None:
    """RequestError for what no call of a student is given, such as a function by its name, and for parts that no
    teacher has."""
    call, parts = settings["call"], settings.get("teacher_parts", {})
    if wrong := [name for name, value in call.items() if name not in (*SAMPLING, *SHAPING)
                 and not isinstance(value, int | float)]:
        raise RequestError(f"{path} gives its pipeline's call {wrong[0][:80]!r}, which no student's is given: there "
                           f"may be {', '.join((*SAMPLING, *SHAPING))}, and numbers of a pipeline's own. {AGAIN}")
    if not 1 <= call.get("num_inference_steps", 1) <= MOST:
        raise RequestError(f"{path} is damaged: num_inference_steps is {call['num_inference_steps']}, and should "
                           f"be from 1 to {MOST}. {AGAIN}")
    if wrong := [name for name in parts if name not in PARTS]:
        raise RequestError(f"{path} is damaged: teacher_parts has {wrong[0][:80]!r}; there may be "
                           f"{', '.join(PARTS)}. {AGAIN}")


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, rather than a teacher whose stepdistill.json says what every call of it is
    given."""
    path = folder / SETTINGS
    return path.is_file() and (not (folder / "model_index.json").is_file()
                               or "method" in records.read(path, dict[str, Any], AGAIN))


def weights_of(folder: Path) -> dict[str, str]:
    """File -> sha256 of all that an export's weights are made of."""
    files = [*folder.rglob("*.safetensors"), *folder.glob("adapter_config.json")]
    return {path.relative_to(folder).as_posix(): checksum(path) for path in sorted(files)}


def check_weights(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """RequestError for weights that are not those that were proved. Exports of schema 1 did not write down which these
    were: of them nothing is known but that they hold something."""
    folder = Path(folder)
    if settings.get("schema", 1) == 1:
        files = sorted(folder.rglob("*.safetensors"))
        if not files or not all(check_safetensors(file) for file in files):
            raise RequestError(f"{folder / settings['weights']} holds no weights. {AGAIN}")
        return
    if not settings.get("sha256"):
        raise RequestError(f"{folder / SETTINGS} is damaged: it has no sha256 of the weights. {AGAIN}")
    found = weights_of(folder)
    wrong = [f"{name} is missing" if name not in found else f"{name} is another file"
             for name, said in settings["sha256"].items()
             if found.get(name) != said]
    if wrong:
        raise RequestError(f"the weights in {folder} are not those that were exported and proved: "
                           f"{', '.join(wrong)}. {AGAIN}")


def load(pipe: DiffusionPipeline, folder: str | Path, adapter_name: str = "student") -> dict[str, Any]:
    """Makes `pipe` sample as the student in `folder`, and returns the keyword arguments to call it with:

        settings = stepdistill.load(pipe, folder)
        image = pipe(prompt, **settings).images[0]

    A LoRA is loaded as `adapter_name`, so that `set_adapters`, `fuse_lora` and `unload_lora_weights` work on it, where
    the pipeline has them. Adapters that are active already, such as a style's, stay so at their weights, and a second
    student wants an `adapter_name` of its own. A whole pipeline lends its denoiser. The scheduler is replaced by the
    folder's. RequestError if the student does not fit.
    """
    settings = read_settings(folder)
    check_weights(folder, settings)
    _check_fused(pipe, folder, settings)
    if settings["format"] == "pipeline":
        _replace_denoiser(pipe, folder, settings)
    else:
        _load_lora(pipe, folder, settings, adapter_name)
    scheduler = read_scheduler(folder)
    if parted := _parted(pipe.scheduler, scheduler):
        log.warning(f"the student in {folder}, made for {settings['teacher']}, has learned another noise than this "
                    f"{type(pipe).__name__} has: {'; '.join(parted)}. Its pictures will be wrong, unless the "
                    "pipeline's scheduler was changed before")
    pipe.scheduler = scheduler
    return dict(settings["call"])


def base_of(settings: dict[str, Any]) -> Source:
    """The teacher of an export, with the LoRAs that were fused into it. settings: its stepdistill.json; exports of
    earlier versions name the base and its revision alone."""
    loras = tuple(FusedLora(row["path"], row["weight"]) for row in settings.get("teacher_loras", []))
    parts = {name: tuple(value) if isinstance(value, list) else value
             for name, value in settings.get("teacher_parts", {}).items()}
    return Source(settings["teacher"], settings["revision"], loras=loras, **parts)


def open_export(folder: str | Path, teacher: str | Path | Source | None = None,
                fused: bool = True) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """(a fresh stock pipeline in float32 that samples as the folder says, the settings to call it with).

    teacher: where the base pipeline lies now, if not where the folder says; a Source: all of it. fused: a LoRA is added
    to the weights, so that a call costs what one of the base does; otherwise, and on a quantised base, it lies beside
    them.
    """
    settings = read_settings(folder)
    cls = pipeline_class(settings["pipeline"])
    if settings["format"] == "pipeline":
        check_weights(folder, settings)
        return fresh_pipeline(cls, Source(str(folder))), dict(settings["call"])
    base = base_of(settings)
    pipe = fresh_pipeline(cls, teacher if isinstance(teacher, Source)
                          else replace(base, base=str(teacher or base.base)))
    call = load(pipe, folder)
    if fused and quantization_of(pipe.components[component(pipe)]) is None:
        fuse(pipe)
    return pipe, call


def fuse(pipe: DiffusionPipeline) -> None:
    """Adds the loaded LoRA to the denoiser's weights and removes its layers: the pipeline is a plain one then."""
    if not loads_loras(pipe):
        take_off(pipe.components[component(pipe)], merge=True)
        return
    pipe.fuse_lora(components=[component(pipe)])
    pipe.unload_lora_weights()


def fresh_pipeline(cls: type[DiffusionPipeline], source: Source) -> DiffusionPipeline:
    """The stock pipeline of a source; float32, silent. RequestError where it cannot be read."""
    index = index_at(source)
    pipe, _ = read_pipeline(cls, settled(source, index), torch.float32, {} if source.is_file else absent_parts(index))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_scheduler(folder: str | Path) -> diffusers.SchedulerMixin:
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    name = records.read(path, records.SchedulerConfig, AGAIN, infinite=True)["_class_name"]
    try:
        return scheduler_class(name).from_pretrained(folder, subfolder="scheduler")
    except UNLOADABLE as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path} is damaged: no {name} can be made of it ({first_lines(error)}). {AGAIN}") from error


def _parted(here: SchedulerMixin, there: SchedulerMixin) -> list[str]:
    """Where the noise of a pipeline is another than that of a student's scheduler: what its network predicts, and its
    schedule."""
    flows = ["a flow" if is_flow(scheduler) else "a diffusion" for scheduler in (here, there)]
    if flows[0] != flows[1]:
        return [f"its scheduler is of {flows[0]}, the student's of {flows[1]}"]
    # the count of a CMStochasticIterativeScheduler is of the nodes that a call's timesteps name: its network is told
    # levels
    counts = not isinstance(there, CMStochasticIterativeScheduler)
    both = [name for name in LAW if name in here.config and name in there.config
            and (counts or name != "num_train_timesteps")]
    return [f"{name} is {here.config[name]} here and {there.config[name]} there" for name in both
            if here.config[name] != there.config[name]]


def _check_fused(pipe: DiffusionPipeline, folder: str | Path, settings: dict[str, Any]) -> None:
    """RequestError where `pipe` is not the base with the LoRAs that the student was trained on, as far as the folder
    lends none of it."""
    own = component(pipe) if settings["format"] == "pipeline" else None
    for trace in traces_of(settings.get("teacher_traces", [])):
        if trace.component != own and not trace.shows(pipe):
            lora = settings["teacher_loras"][trace.lora]
            raise RequestError(f"the student in {folder} was trained on {settings['teacher']} with the LoRA "
                               f"{lora['path']} fused into it, and {trace.weight} of the {trace.component} of this "
                               f"{type(pipe).__name__} is without it: first call pipe.load_lora_weights, "
                               f"pipe.fuse_lora(lora_scale={lora['weight']:g}) and pipe.unload_lora_weights, as "
                               "its card shows")


def _load_lora(pipe: DiffusionPipeline, folder: str | Path, settings: dict[str, Any], adapter_name: str) -> None:
    network = pipe.components[component(pipe)]
    refusal = f"the LoRA in {folder}, made for {settings['teacher']}, does not fit this {type(pipe).__name__}"
    if adapter_name in adapter_names(network):
        raise RequestError(f"this {type(pipe).__name__} carries an adapter {adapter_name} already: load this student "
                           "beside it by another "
                           f'name, such as load(pipe, "{folder}", adapter_name="{adapter_name}-2"), or call '
                           'pipe.unload_lora_weights() first')
    active = active_adapters(network)
    try:
        if loads_loras(pipe):
            with complaints():
                pipe.load_lora_weights(folder,
                                       weight_name=FusedLora(str(Path(folder) / settings["weights"])).file().name,
                                       adapter_name=adapter_name, use_safetensors=True)
            names = NAMES.get(family_of(settings["pipeline"]).name) if settings["format"] == "comfyui" else None
            wrong = _astray(Path(folder) / settings["weights"], adapter_state(network, adapter_name), names)
        else:
            wrong = load_adapter(network, folder, adapter_name)
    except UNLOADABLE as error:
        drop_adapter(network, adapter_name, active)
        raise RequestError(f"{refusal}: {first_lines(error)}") from error
    if wrong:
        drop_adapter(network, adapter_name, active)
        raise RequestError(f"{refusal}: {'; '.join(wrong)[:500]}")
    activate(network, [*active, adapter_name])


def _astray(file: Path, landed: Mapping[str, Tensor], names: Names | None) -> list[str]:
    """What of a LoRA's file found no layer, and what of the adapter on the network the file does not hold. Modules are
    compared by their names without dots, as kohya writes them. names: those that the file has for ComfyUI."""
    flat = lambda key: re.sub(r"^(unet|transformer|lora_unet|diffusion_model)[._]", "",
                              key.split(".lora_")[0]).replace(".", "_")
    name = (lambda module: f"unet.{module}") if names is None else names.key
    found = {flat(name(key.split(".lora_")[0])): key for key in landed}
    beside = set() if names is None else {names.beside(key.split(".lora_")[0]) for key in landed}
    with safe_open(file, "pt") as tensors:
        held = {flat(key): key for key in tensors.keys() if ".lora_" in key and key.split(".lora_")[0] not in beside}
    lost, odd = sorted(held.keys() - found.keys()), sorted(found.keys() - held.keys())
    return ([f"{len(lost)} of its {len(held)} modules are none of this network's, first {held[lost[0]]}"] if lost
            else []) + (
        [f"{len(odd)} modules of the adapter are not in its file, first {found[odd[0]]}"] if odd else [])


def _replace_denoiser(pipe: DiffusionPipeline, folder: str | Path, settings: dict[str, Any]) -> None:
    name = component(pipe)
    old = pipe.components[name]
    new = type(old).from_pretrained(folder, subfolder=name, dtype=old.dtype,
                                    use_safetensors=True).to(old.device, old.dtype)
    shapes = [{key: tuple(value.shape) for key, value in network.state_dict().items() if "cond_proj" not in key}
              for network in (old, new)]
    differing = sorted(key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key))
    if differing:
        raise RequestError(f"the {name} in {folder}, made for {settings['teacher']}, does not fit this "
                           f"{type(pipe).__name__}: "
                           f"{len(differing)} weights differ in shape, first {differing[0]} "
                           f"({shapes[0].get(differing[0])} here, {shapes[1].get(differing[0])} there)")
    pipe.register_modules(**{name: new})
