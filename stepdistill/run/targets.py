"""From a run, an export or a pipeline to what `sample` and `bench` call."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin
from safetensors import SafetensorError

from .. import resources
from ..data.cache import fingerprint
from ..errors import RequestError, first_lines
from ..evaluation.plans import Target, at_guidance, at_steps, serve
from ..export import open_export, read_settings
from ..export.folder import base_of, fresh_pipeline, is_export
from ..methods.base import middle
from ..models.families import FAMILIES, family_of, stock_guidance, stock_prompts, text_to_image
from ..models.loading import caller
from ..models.sources import Source, call_of, class_at, commit_of, index_at
from ..models.stock import Guidance, defaults, unknown
from ..models.teacher import every_call, load_teacher
from ..models.weights import settled
from ..recipe.plugins import Folder
from .folder import is_run
from .setup import Run, open_run
from .sources import bring_family, located

FEW = 4                                            # steps of a few-step generator of others that does not say its own
SIZE = ("height", "width", "num_frames")
FEW_STEP = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "SCMScheduler", "CMStochasticIterativeScheduler")


@dataclass(frozen=True)
class Opened:
    """A target. Of a student also where its teacher lies and the guidance scale that it was trained at."""

    target: Target
    source: Source
    teacher: Source | None = None
    guidance: float | None = None


def open_target(name: str | Path | Source, called: str, few_step: bool = False, say: Callable[[str], None] = print,
                plugins: Folder | None = None, checkpoint: int | None = None, weights: str | None = None) -> Opened:
    """A run folder, an export folder, or a pipeline by folder, Hub id or Source. called: its name in tables.

    few_step: the pipeline is a few-step generator, whoever made it. One whose scheduler is made for such is taken for
    one with a word. plugins: where the family of a pipeline may lie; a run has its own. checkpoint, weights: of a run,
    as of `open_run`.
    """
    found = None if isinstance(name, Source) else resources.locate(name)
    if found is not None and is_run(found):
        run = open_run(found, checkpoint, weights)
        target = student_target(run, called)
        made = made_of(Source(str(found))) | dict(target.made) | {"teacher": made_of(run.teacher.source)}
        target = replace(target, made=made, identity=fingerprint(run.checkpoint))
        return Opened(target, Source(str(found)), run.teacher.source, run.guidance)
    if checkpoint is not None or weights is not None:
        raise RequestError(f"{name} is no run folder, and checkpoints and a choice of ema or student are a run's: "
                           "leave --checkpoint and --weights out")
    if found is not None and is_export(found):
        return _open_export(found, called, plugins)
    source = located(Source.of(name))
    bring_family(class_at(source), plugins)
    source = settled(source, index_at(source))        # as a run of it names it
    pipeline = _pipeline(source)
    given = _given(pipeline, source)
    if not few_step and (sign := few_step_sign(pipeline.scheduler)):
        say(f"{called} has {sign}: it is called as the few-step generator that this makes it, under its own scheduler "
            f"and in {FEW} steps unless told otherwise")
        few_step = True
    call = few_step_call(stock_guidance(pipeline), type(pipeline).__name__) if few_step else None
    return Opened(Target(called, pipeline, call=call, given=given, guided=source.guided,
                         identity=fingerprint(source.place),
                         made=made_of(source)), source)


def ships(opened: Opened) -> bool:
    """Whether a target draws Shapes: one that ships, or a student of one."""
    return Path((opened.teacher or opened.source).place).is_relative_to(resources.SHARE / "assets")


def made_of(source: Source, lora: str | None = None) -> dict[str, Any]:
    """What results.json says of a target's weights. Of a Hub id with the commit, as the cache holds it."""
    commit = None if Path(source.place).exists() else commit_of(source.place, "model_index.json", source.revision)
    revision = commit or source.revision
    return {"weights": resources.named(source.place)} | ({} if revision is None else {"revision": revision}) | (
        {} if lora is None else {"lora": lora}) | ({"teacher_loras": "fused"} if source.loras else {})


def few_step_sign(scheduler: SchedulerMixin) -> str | None:
    """What of its scheduler shows that a pipeline was distilled: LCM, TCD, Hyper-SD, sCM and consistency models bring
    their own, SD-Turbo and SDXL-Turbo an ancestral one on trailing steps. Lightning and DMD2 bring none."""
    kind, config = type(scheduler).__name__, scheduler.config
    if kind in FEW_STEP or kind == "EulerAncestralDiscreteScheduler" and config.get("timestep_spacing") == "trailing":
        return f"an {kind}" + " on trailing steps" * (kind not in FEW_STEP)
    return None


def few_step_call(spoken: Guidance, pipeline: str) -> dict[str, Any]:
    """How few-step generators of a pipeline class are meant to be called: without classifier-free guidance; one whose
    network reads a scale, at its pipeline's own. spoken: how a call says its guidance."""
    reads = spoken.within or "LatentConsistency" in pipeline
    return {"num_inference_steps": FEW} | ({} if reads else dict(spoken.none))


def student_target(run: Run, name: str) -> Target:
    """A run's student as a stock pipeline, for a bench."""
    network = run.roles.stock_network(run.sampling_role, run.method.sampler, run.guidance)
    pipeline = run.teacher.pipeline(network.to(run.teacher.codec.dtype), run.scheduler())
    reads = run.roles.reads[run.sampling_role]
    return Target(name, pipeline, run.recipe.method, dict(run.stock.call), trained=run.recipe.guidance,
                  fixed_steps="r" in reads or run.recipe.trains_solver,
                  made={"lora": "merged"} if run.recipe.student.lora is not None else {})


def teachers(opened: Sequence[Opened], say: Callable[[str], None] = print) -> list[Target]:
    """The pipelines that were asked for and those that students were made from, each once. Of the latter one that
    cannot be loaded is left out, with a word."""
    given = {o.source: o.target.pipeline for o in opened if o.target.call is None}
    made = dict.fromkeys(o.teacher for o in opened if o.teacher is not None and o.teacher not in given)
    pipelines = dict(given)
    for source in made:
        try:
            pipelines[source] = _pipeline(source)
        except RequestError as error:
            say(f"the teacher {source} does not stand beside its student: {error}")
    name = lambda source: "teacher" if len(pipelines) == 1 else Path(source.place).name
    return [Target(name(source), pipeline, given=_given(pipeline, source) | _sizes(opened, source),
                   guided=source.guided, companion=source in made,
                   identity=fingerprint(source.place), made=made_of(source)) for source, pipeline in pipelines.items()]


def _sizes(opened: Sequence[Opened], teacher: Source) -> dict[str, Any]:
    """The size that the students of a teacher draw, which is a recipe's to choose: it stands beside them at that. None
    where they differ."""
    asked = [{name: o.target.call[name] for name in SIZE if name in o.target.call} for o in opened
             if o.teacher == teacher and o.target.call]
    return asked[0] if asked and all(one == asked[0] for one in asked) else {}


def call_as_asked(target: Target, steps: int | None, guidance: float | None,
                  say: Callable[[str], None]) -> dict[str, Any]:
    """The keyword arguments of a call of a target in so many steps and at this scale, its own where None. RequestError
    for what it does not serve."""
    if target.call is None:
        call = {**target.given} | ({} if steps is None else {"num_inference_steps": steps})
        if steps is not None:
            serve(target.pipeline.scheduler, steps)
    else:
        call = {**target.given, **(target.call if steps is None else at_steps(target, steps))}
    return call if guidance is None else call | at_guidance(target, guidance, say)


def away_from(target: Target, call: dict[str, Any], negative: str | None) -> dict[str, Any]:
    """A call of a target, drawn away from a negative prompt. RequestError where none acts on it."""
    if negative is None:
        return call
    kind = type(target.pipeline)
    if unknown(kind, {"negative_prompt": negative}):
        raise RequestError(f"--negative: a call of {kind.__name__} takes no negative prompt")
    if target.guidance.within or target.guidance.scale({**defaults(kind), **call}) <= 1:
        raise RequestError(f"--negative has no effect on {target.name}, which is called without guidance: it acts "
                           "on a teacher with --guidance above 1, and on a student whose recipe has negatives, "
                           "which keeps its guidance")
    return call | {"negative_prompt": negative}


def _given(pipeline: DiffusionPipeline, source: Source) -> dict[str, Any]:
    """What every call of it is given."""
    name = type(pipeline).__name__
    return every_call(family_of(name), pipeline.components, source)[1] if name in FAMILIES else call_of(source)


def _must_draw(pipeline: DiffusionPipeline) -> None:
    """RequestError for a pipeline whose call takes no prompt, or something beside it that it does not do without."""
    spelled, takes = stock_prompts(pipeline), signature(pipeline.__call__).parameters
    needs = [name for name, one in takes.items() if one.default is Parameter.empty
             and one.kind is not Parameter.VAR_KEYWORD and name != spelled.keyword]
    if (not {spelled.keyword, spelled.count} & takes.keys() or needs
        or re.search("Img2Img|Inpaint", type(pipeline).__name__)):
        lacks = (f"needs {', '.join(needs)}" if needs else "needs a picture" if spelled.keyword in takes
                 else f"takes no {spelled.keyword}")
        raise RequestError(f"a {type(pipeline).__name__} {lacks}: `sample` and `bench` draw pictures of prompts alone")


@contextmanager
def asking(pipeline: DiffusionPipeline) -> Iterator[None]:
    """A pipeline that no family describes may want what only its call can say, and any may have a scheduler's config
    that no call can do with: RequestError with its words."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        if isinstance(error, RequestError):
            raise
        if type(pipeline).__name__ in FAMILIES:
            raise RequestError(f"a call of this {type(pipeline).__name__} under its "
                               f"{type(pipeline.scheduler).__name__} fails: {first_lines(error)}. Save, download "
                               "or export it anew") from error
        raise RequestError(f"a {type(pipeline).__name__} draws nothing of a prompt alone, as `sample` and `bench` "
                           f"ask it to: {first_lines(error)}") from error


def _open_export(folder: Path, called: str, plugins: Folder | None) -> Opened:
    settings = read_settings(folder)
    bring_family(settings["pipeline"], plugins)
    teacher = located(base_of(settings))
    pipeline, call = open_export(folder, teacher)
    trained = settings["trained_guidance"]
    guidance = None if trained is None else middle(trained)
    target = Target(called, pipeline, settings["method"], call, identity=fingerprint(folder), trained=trained,
                    fixed_steps=settings.get("fixed_steps", False),
                    made=made_of(Source(str(folder)), None if settings["format"] == "pipeline" else "fused")
                    | {"teacher": made_of(teacher)})
    return Opened(target, Source(str(folder)), teacher, guidance)


def _pipeline(source: Source) -> DiffusionPipeline:
    index = index_at(source)
    kind = text_to_image(index["_class_name"])
    if kind in FAMILIES and (reason := family_of(kind).no_pipeline):
        raise RequestError(reason)
    try:
        if source.is_file:
            return load_teacher(source).pipeline()
        pipeline = fresh_pipeline(getattr(diffusers, caller(source, index)) if kind in FAMILIES
                                  else DiffusionPipeline, source)
    except (OSError, SafetensorError, ValueError) as error:
        raise RequestError(f"{source} cannot be loaded as a diffusers pipeline: {first_lines(error)}") from error
    _must_draw(pipeline)
    return pipeline
