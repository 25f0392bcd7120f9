"""From a run, an export or a pipeline to what `sample` and `bench` call."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from .. import resources
from ..errors import RequestError, first_lines
from ..evaluation.plans import Target
from ..export import open_export, read_settings
from ..export.folder import fresh_pipeline, is_export
from ..methods.base import middle
from ..models.families import FAMILIES, family_of
from ..models.sources import class_at
from ..models.teacher import call_of, every_call, load_teacher
from .folder import is_run
from .setup import Run, open_run


@dataclass(frozen=True)
class Opened:
    """A target. Of a student also where its teacher lies and the guidance scale that it was trained at."""

    target: Target
    source: str
    teacher: str | None = None
    revision: str | None = None
    guidance: float | None = None


def open_target(name: str | Path, called: str) -> Opened:
    """A run folder, an export folder, or a pipeline by folder or Hub id. called: its name in tables."""
    found = resources.locate(name)
    if found is not None and is_run(found):
        run = open_run(found)
        return Opened(student_target(run, called), str(found), run.teacher.source, run.teacher.revision, run.guidance)
    if found is not None and is_export(found):
        return _open_export(found, called)
    source = resources.pipeline(str(name))
    pipeline = _pipeline(source, None)
    return Opened(Target(called, pipeline, given=_given(pipeline, source)), source)


def student_target(run: Run, name: str) -> Target:
    """A run's student as a stock pipeline, for a bench."""
    network = run.roles.stock_network(run.sampling_role, run.method.sampler, run.guidance)
    pipeline = run.teacher.pipeline(network.to(run.teacher.codec.dtype), run.scheduler())
    return Target(name, pipeline, run.recipe.method, dict(run.stock.call))


def teachers(opened: Sequence[Opened]) -> list[Target]:
    """The pipelines that were asked for and those that students were made from, each once."""
    given = {o.source: o.target.pipeline for o in opened if o.teacher is None}
    made = {o.teacher: o.revision for o in opened if o.teacher is not None and o.teacher not in given}
    pipelines = given | {source: _pipeline(source, revision) for source, revision in made.items()}
    name = lambda source: "teacher" if len(pipelines) == 1 else Path(source).name
    return [Target(name(source), pipeline, given=_given(pipeline, source), companion=source in made) for source, pipeline in pipelines.items()]


def must_serve(scheduler: Any, call: Mapping[str, Any]) -> None:
    """RequestError where a scheduler has no such number of steps."""
    steps = call.get("num_inference_steps")
    if steps is None or "timesteps" in call or "sigmas" in call:
        return
    own = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}      # a pipeline's, whose value matters not
    try:
        deepcopy(scheduler).set_timesteps(steps, **own)
    except ValueError as error:
        raise RequestError(f"{type(scheduler).__name__} does not serve {steps} steps: {error}") from error


def _given(pipeline: DiffusionPipeline, source: str) -> dict[str, Any]:
    """What every call of it is given."""
    name = type(pipeline).__name__
    return every_call(family_of(name), pipeline.components, source)[1] if name in FAMILIES else call_of(source)


def _open_export(folder: Path, called: str) -> Opened:
    settings = read_settings(folder)
    teacher = resources.pipeline(settings["teacher"])
    pipeline, call = open_export(folder, teacher)
    trained = settings["trained_guidance"]
    guidance = None if trained is None else middle(trained)
    return Opened(Target(called, pipeline, settings["method"], call), str(folder), teacher, settings["revision"], guidance)


def _pipeline(source: str, revision: str | None) -> DiffusionPipeline:
    kind = class_at(source, revision)
    if kind in FAMILIES and (reason := family_of(kind).no_pipeline):
        raise RequestError(reason)
    try:
        if source.endswith(".safetensors"):
            return load_teacher(source).pipeline()
        return fresh_pipeline(DiffusionPipeline, source, revision)
    except (OSError, SafetensorError, ValueError) as error:
        raise RequestError(f"{source} cannot be loaded as a diffusers pipeline: {first_lines(error)}") from error
