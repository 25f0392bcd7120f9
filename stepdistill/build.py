"""The functions that commands and notebooks call: train, sample, bench, export, load."""
from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from . import parallel, resources, runs
from .data.cache import Cache, Report
from .data.stream import Stream
from .data.toy import is_toy
from .diffusion.draws import key
from .errors import RequestError, gist
from .evaluation import sweep
from .evaluation.plans import SOLVERS, Target
from .evaluation.sheets import sheet
from .export import Student, export_student, load, open_export, read_settings
from .export.folder import fresh_pipeline, is_export
from .methods.base import middle
from .models.families import call_of, load_teacher
from .recipe import Recipe
from .training import TrainConfig, Trainer, launched
from .watch import CLOUD, Watch
from .work import checked, dataset, fill_pairs, handed, make, open_run, pairs_shelf, prompts, rates, served

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
__all__ = ["bench", "export", "load", "pairs", "sample", "train"]


def train(recipe: str | Path | Mapping[str, Any] | Recipe, *, out: str | Path | None = None, resume: bool = False,
          **overrides: Any) -> Path:
    """Distils a student as a recipe says, and returns the run's folder.

    recipe: a path, a built-in name, a mapping. overrides: entries by dotted name, train(..., **{"train.lr": 1e-3}), or
    by table, train(..., train={"lr": 1e-3}). RequestError for what cannot work, before anything is written; Stopped
    where a run had to end, with what it saved kept. A recipe's stages are trained one after the other; a resumed run goes on
    in the stage where it stopped.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, overrides)
    device = launched()
    run = runs.place(recipe, out, resume)
    for stage in recipe.stages:
        checked(stage)
    before: Path | None = None
    for stage, folder in zip(recipe.stages, runs.folders(recipe, run), strict=True):
        if folder == run or not runs.finished(folder, stage):
            _train(stage, recipe, before, folder, run, device, resume)
        before = folder
    return run


def _train(recipe: Recipe, whole: Recipe, before: Path | None, folder: Path, run: Path, device: torch.device, resume: bool) -> None:
    """One stage of the whole recipe, in its own folder of the run. before: the folder of the stage before."""
    work = make(recipe, device, before=None if before is None else handed(recipe, before))
    for stage in whole.stages[len(recipe.stages):]:
        served(stage, work.family)
    with _reported() as report:
        stream = Stream(dataset(work, report), recipe.data.batch, recipe.train.seed, work.family.latent_shape)
        stream.batch(0, "check", world=parallel.world_size(), micros=recipe.train.accumulate)
    watch = Watch(work, folder, prompts(work, CLOUD if work.family.plane else 4))
    config = TrainConfig(**recipe.train.model_dump(exclude={"ema", "gradient_checkpointing", "attention"}), rates=rates(recipe))
    trainer = Trainer(work.method, work.roles, stream, config, folder, [watch])
    begun = {run: whole, folder: recipe}
    for place in [place for place in begun if not runs.is_run(place)]:          # asked of all before one is written
        runs.begin(place, _pinned(begun[place]), device)
    if parallel.rank() == 0 and len(whole.stages) > 1:
        Console(stderr=True).print(f"stage {len(recipe.stages)} of {len(whole.stages)}: {recipe.method}, {recipe.steps} steps")
    trainer.train(resume)


@dataclass(frozen=True)
class MadePairs:
    """Where the teacher's pairs lie, how many there are, and how many of them were made just now."""

    folder: Path
    count: int
    made: int
    seconds: float


def pairs(recipe: str | Path | Mapping[str, Any] | Recipe, *, out: str | Path | None = None, **overrides: Any) -> MadePairs:
    """Makes the teacher's pairs of noise and picture that a recipe trains on, those that are not there yet.

    They lie in the cache, where a training finds them, or in the folder `out`, for a recipe's data.pairs.path.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, overrides)
    recipe = next((stage for stage in recipe.stages if stage.data.kind == "pairs" and not stage.taught_by_previous), recipe)
    if recipe.data.kind != "pairs":
        raise recipe.refuse("data", f"names {recipe.data.kind}; pairs are made for recipes that train on them, such as "
                            "data: {pairs: {prompts: shapes, solver: ddim, steps: 25}, count: 4096, batch: 64}")
    if recipe.taught_by_previous:
        raise recipe.refuse("data.pairs", "are made by the student of the stage before, once that is trained: a training makes them")
    work, start = make(recipe, launched()), time.perf_counter()
    with _reported() as report, parallel.main_first():
        cache = Cache(report=report)
        shelf = pairs_shelf(work, cache, out)
        missing = recipe.data.count - shelf.made()
        fill_pairs(work, shelf, cache)
    return MadePairs(shelf.folder, recipe.data.count, missing, time.perf_counter() - start)


def export(run: str | Path, to: str = "lora", guidance: float | None = None, out: str | Path | None = None) -> Path:
    """Writes a run's student for stock diffusers, once a stock pipeline has given its pictures. Returns the folder."""
    run = Path(run)
    out = run / "export" / to if out is None else Path(out)
    work = open_run(run)
    student = Student.of(work.roles, work.best, work.inference, work.recipe.method, run.resolve().name, guidance=work.recipe.guidance,
                         teacher=resources.portable(work.recipe.teacher), results=runs.results_of(run), prompts=tuple(prompts(work)))
    export_student(student, to, out, guidance)
    return out


def sample(target: str | Path, prompts: str | Sequence[str], *, steps: int | None = None, seed: int = 0,
           guidance: float | None = None, out: str | Path | None = None) -> list[Image.Image]:
    """Pictures of a run, an export or any pipeline, one a prompt; written to `out`, several as a sheet.

    steps and guidance are the student's own, and a pipeline's defaults, unless given. A picture depends on the seed and
    on its place in the list; where a pipeline's scheduler draws from the global generator, on the list's length too.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if out is not None and Path(out).suffix.lower() not in PICTURES:
        raise RequestError(f"the picture {out} should be a {', '.join(PICTURES)} file")
    opened = open_target(target, "target")
    call = {**opened.target.given, **(opened.target.call or {})}
    call |= {name: value for name, value in (("num_inference_steps", steps), ("guidance_scale", guidance)) if value is not None}
    pipeline = opened.target.pipeline.to(launched())
    _must_serve(pipeline.scheduler, call)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(key(seed, "sample", i)) for i in range(len(texts))]
    with torch.random.fork_rng():
        torch.manual_seed(key(seed, "pipeline"))
        pixels = pipeline(prompt=texts, generator=generators, output_type="pt", **call).images.float().cpu()
    pictures = pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(pixels))
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        pictures[0].save(out) if len(pictures) == 1 else sheet(pixels * 2 - 1, out)
    return pictures


def bench(*targets: str | Path, nfe: Sequence[int] = (1, 2, 4, 8), samples: int = 2000, out: str | Path = "bench", seed: int = 0,
          guidance: Sequence[float] | None = None, solvers: Sequence[str] = tuple(SOLVERS),
          features: str | Path = "assets/shapes-clip", reference: str | Path = "shapes", prompts: Sequence[str] | None = None,
          reuse: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Quality and latency against network evaluations: the table of results.json, which is written to `out` with curve.png.

    The teachers of students stand in the table too, at `guidance`, or at the scale that the student was trained for.
    """
    opened = [open_target(target, Path(target).resolve().name) for target in targets]
    scales = tuple(guidance) if guidance else tuple(dict.fromkeys(o.scale for o in opened if o.scale is not None)) or (1.0,)
    device = launched()
    every = [*(o.target for o in opened if o.teacher is not None), *_teachers(opened)]
    for target in every:
        target.pipeline.to(device)
    return sweep.bench(every, nfe, samples, out, scales, solvers, seed, prompts, resources.locate(features) or features, reference,
                       reuse, device=device, say=Console(stderr=True).print)


def quiet() -> None:
    """For commands: the notices and loading bars of diffusers and transformers are not theirs to show."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


# -- targets -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Opened:
    """A target, and of a student where its teacher lies and the guidance scale that it was trained at."""

    target: Target
    source: str
    teacher: str | None = None
    revision: str | None = None
    scale: float | None = None


def open_target(name: str | Path, called: str) -> Opened:
    """A run folder, an export folder, or a pipeline by folder or Hub id. called: what stands in tables."""
    found = resources.locate(name)
    if found is not None and runs.is_run(found):
        work = open_run(found)
        return Opened(work.target(called), str(found), work.family.source, work.family.revision, work.scale)
    if found is not None and is_export(found):
        return _open_export(found, called)
    source = resources.pipeline(str(name))
    return Opened(Target(called, _pipeline(source, None), given=call_of(source)), source)


def _open_export(folder: Path, called: str) -> Opened:
    said = read_settings(folder)
    teacher = resources.pipeline(said["teacher"])
    pipeline, call = open_export(folder, teacher)
    trained = said["trained_guidance"]
    scale = None if trained is None else middle(trained)
    return Opened(Target(called, pipeline, said["method"], call), str(folder), teacher, said["revision"], scale)


def _pipeline(source: str, revision: str | None) -> DiffusionPipeline:
    try:
        if source.endswith(".safetensors") or is_toy(source):           # Toy has none, and says so
            return load_teacher(source).pipeline()
        return fresh_pipeline(DiffusionPipeline, source, revision)
    except (OSError, SafetensorError, ValueError) as error:
        raise RequestError(f"{source} cannot be loaded as a diffusers pipeline: {gist(error)}") from error


def _teachers(opened: Sequence[Opened]) -> list[Target]:
    """The pipelines that were asked for and those that students were made from, each once."""
    given = {o.source: o.target.pipeline for o in opened if o.teacher is None}
    made = {o.teacher: o.revision for o in opened if o.teacher is not None and o.teacher not in given}
    pipelines = given | {source: _pipeline(source, revision) for source, revision in made.items()}
    single = len(pipelines) == 1
    return [Target("teacher" if single else Path(source).name, pipeline, given=call_of(source), companion=source in made)
            for source, pipeline in pipelines.items()]


def _must_serve(scheduler: Any, call: Mapping[str, Any]) -> None:
    steps = call.get("num_inference_steps")
    if steps is None or "timesteps" in call or "sigmas" in call:
        return
    try:
        deepcopy(scheduler).set_timesteps(steps)
    except ValueError as error:
        raise RequestError(f"{type(scheduler).__name__} does not serve {steps} steps: {error}") from error


# -- training ------------------------------------------------------------------------------------------------------------

def _pinned(recipe: Recipe) -> Recipe:
    """The recipe with the commit of a Hub teacher: the one that the cache holds, since it was loaded a moment ago."""
    if resources.locate(recipe.teacher) is not None:
        return recipe
    from huggingface_hub import try_to_load_from_cache
    index = try_to_load_from_cache(recipe.teacher, "model_index.json", revision=recipe.revision)
    return recipe.pinned(Path(index).parent.name) if isinstance(index, str) else recipe


@contextmanager
def _reported() -> Iterator[Report]:
    """A progress bar for each thing that is made once and kept."""
    with Progress(console=Console(stderr=True), transient=True, disable=parallel.rank() != 0) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"caching {what}", total=total)
            bar.update(tasks[what], completed=done)
        yield report
