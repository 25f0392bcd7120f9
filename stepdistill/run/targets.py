"""From a run, an export or a pipeline to what `sample` and `bench` call."""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from .. import resources
from ..data.cache import fingerprint
from ..errors import RequestError, first_lines
from ..evaluation.plans import Target
from ..export import open_export, read_settings
from ..export.folder import base_of, fresh_pipeline, is_export
from ..methods.base import middle
from ..models.families import FAMILIES, family_of, stock_prompts, text_to_image
from ..models.loading import caller
from ..models.sources import Source, call_of, index_at
from ..models.teacher import every_call, load_teacher
from ..models.weights import settled
from ..training import checkpoints
from .folder import is_run
from .setup import Run, open_run
from .sources import located


@dataclass(frozen=True)
class Opened:
    """A target. Of a student also where its teacher lies and the guidance scale that it was trained at."""

    target: Target
    source: Source
    teacher: Source | None = None
    guidance: float | None = None


def open_target(name: str | Path | Source, called: str) -> Opened:
    """A run folder, an export folder, or a pipeline by folder, Hub id or Source. called: its name in tables."""
    found = None if isinstance(name, Source) else resources.locate(name)
    if found is not None and is_run(found):
        run = open_run(found)
        student = replace(student_target(run, called), identity=fingerprint(checkpoints.latest(found)))
        return Opened(student, Source(str(found)), run.teacher.source, run.guidance)
    if found is not None and is_export(found):
        return _open_export(found, called)
    source = located(Source.of(name))
    source = settled(source, index_at(source))        # as a run of it names it
    pipeline = _pipeline(source)
    return Opened(Target(called, pipeline, given=_given(pipeline, source), guided=source.guided,
                         identity=fingerprint(source.place)), source)


def student_target(run: Run, name: str) -> Target:
    """A run's student as a stock pipeline, for a bench."""
    network = run.roles.stock_network(run.sampling_role, run.method.sampler, run.guidance)
    pipeline = run.teacher.pipeline(network.to(run.teacher.codec.dtype), run.scheduler())
    return Target(name, pipeline, run.recipe.method, dict(run.stock.call))


def teachers(opened: Sequence[Opened]) -> list[Target]:
    """The pipelines that were asked for and those that students were made from, each once."""
    given = {o.source: o.target.pipeline for o in opened if o.teacher is None}
    made = dict.fromkeys(o.teacher for o in opened if o.teacher is not None and o.teacher not in given)
    pipelines = given | {source: _pipeline(source) for source in made}
    name = lambda source: "teacher" if len(pipelines) == 1 else Path(source.place).name
    return [Target(name(source), pipeline, given=_given(pipeline, source), guided=source.guided, companion=source in made,
                   identity=fingerprint(source.place)) for source, pipeline in pipelines.items()]


def must_serve(scheduler: Any, call: Mapping[str, Any], own: int | None = None) -> None:
    """RequestError where a scheduler has no such number of steps.

    own: that of a student, which on a flow has no other: its call holds their times, or its scheduler was made to give them.
    """
    steps = call.get("num_inference_steps")
    if own not in (None, steps) and type(scheduler).__name__.startswith("FlowMatch"):
        raise RequestError(f"this student has {own} steps at times that it was made for; found {steps}: leave --steps out")
    if steps is None or "timesteps" in call or "sigmas" in call:
        return
    own = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}      # a pipeline's, whose value matters not
    try:
        deepcopy(scheduler).set_timesteps(steps, **own)
    except ValueError as error:
        raise RequestError(f"{type(scheduler).__name__} does not serve {steps} steps: {error}") from error


def _given(pipeline: DiffusionPipeline, source: Source) -> dict[str, Any]:
    """What every call of it is given."""
    name = type(pipeline).__name__
    return every_call(family_of(name), pipeline.components, source)[1] if name in FAMILIES else call_of(source)


def _must_draw(pipeline: DiffusionPipeline) -> None:
    """RequestError for a pipeline whose call takes no prompt, or something beside it that it does not do without."""
    spelled, takes = stock_prompts(pipeline), signature(pipeline.__call__).parameters
    needs = [name for name, one in takes.items() if one.default is Parameter.empty and one.kind is not Parameter.VAR_KEYWORD and name != spelled.keyword]
    if not {spelled.keyword, spelled.count} & takes.keys() or needs or re.search("Img2Img|Inpaint", type(pipeline).__name__):
        lacks = f"needs {', '.join(needs)}" if needs else "needs a picture" if spelled.keyword in takes else f"takes no {spelled.keyword}"
        raise RequestError(f"a {type(pipeline).__name__} {lacks}: `sample` and `bench` draw pictures of prompts alone")


@contextmanager
def asking(pipeline: DiffusionPipeline) -> Iterator[None]:
    """A pipeline that no family describes may want what only its call can say: RequestError with its words."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, RequestError) or type(pipeline).__name__ in FAMILIES:
            raise
        raise RequestError(f"a {type(pipeline).__name__} draws nothing of a prompt alone, as `sample` and `bench` ask it to: {first_lines(error)}") from error


def _open_export(folder: Path, called: str) -> Opened:
    settings = read_settings(folder)
    teacher = located(base_of(settings))
    pipeline, call = open_export(folder, teacher)
    trained = settings["trained_guidance"]
    guidance = None if trained is None else middle(trained)
    student = Target(called, pipeline, settings["method"], call, identity=fingerprint(folder))
    return Opened(student, Source(str(folder)), teacher, guidance)


def _pipeline(source: Source) -> DiffusionPipeline:
    index = index_at(source)
    kind = text_to_image(index["_class_name"])
    if kind in FAMILIES and (reason := family_of(kind).no_pipeline):
        raise RequestError(reason)
    try:
        if source.is_file:
            return load_teacher(source).pipeline()
        pipeline = fresh_pipeline(getattr(diffusers, caller(source, index)) if kind in FAMILIES else DiffusionPipeline, source)
    except (OSError, SafetensorError, ValueError) as error:
        raise RequestError(f"{source} cannot be loaded as a diffusers pipeline: {first_lines(error)}") from error
    _must_draw(pipeline)
    return pipeline
