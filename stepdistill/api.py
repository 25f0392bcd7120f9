"""The functions that commands and notebooks call: train, undistil, doctor, pairs, export, sample, bench, plan, load."""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from . import parallel
from .data.cache import Cache
from .data.stream import Stream
from .errors import RequestError, Stopped
from .evaluation.plans import SOLVERS
from .evaluation.progress import meter
from .evaluation.sheets import sheet
from .evaluation.space import FeatureName, FeatureNames
from .export import Extracted, Student, export_student, hub, load
from .export import check as check_export
from .export import extract as extract_lora
from .models.compiled import compile_blocks
from .models.sharded import shard
from .models.sources import Source
from .models.stock import as_pil, say_cut
from .models.with_teacher import with_teacher
from .recipe import Recipe
from .recipe.plugins import Folder
from .run import benching, composing, folder
from .run.cards import advice, check_card, fit_stage
from .run.checks import check as check_recipe
from .run.checks import needs_of
from .run.data import check_data, dataset, fill_pairs, negatives, pairs_spec, preview_prompts, say_long
from .run.first_call import check_first_call
from .run.health import Health, attend, go_back, health, note
from .run.lora_check import Checked, check_lora
from .run.negatives import example
from .run.own_solver import check_leaves
from .run.pinning import pinned
from .run.plan import plan as plan_recipe
from .run.preview import Preview
from .run.resuming import write_down
from .run.sampling import check_files, check_pictures, draw
from .run.setup import open_run, previous_student, sampling, setup, train_config
from .run.sources import base_of, located
from .run.targets import away_from, call_as_asked, open_target
from .run.teacher_checks import family, quantization
from .run.telling import log, recorded, spoken, write_in
from .run.undistil import TO, undistilling, write_card
from .run.with_teacher import Asked
from .training import Trainer, launched
from .training.doctor import Relapse

RELAPSES = 3                                       # how often a doctor may send a stage back
NFE = (1, 2, 4, 8)
__all__ = ["bench", "check", "doctor", "export", "extract", "load", "pairs", "plan", "sample", "train", "undistil",
           "with_teacher"]


def train(recipe: str | Path | Mapping[str, Any] | Recipe, *, out: str | Path | None = None,
          resume: bool | Literal["auto"] = False, on_step: Callable[[int], None] | None = None,
          **overrides: Any) -> Path:
    """Distils a student as a recipe says, and returns the run's folder.

    recipe: a path, a built-in name, a mapping. overrides: entries by dotted name, train(..., **{"train.lr": 1e-3}), or
    by table, train(..., train={"lr": 1e-3}). A recipe's stages are trained one after the other; a resumed run goes on
    in the stage where it stopped, and resume="auto" begins one where there is none. on_step: called after every step of
    each stage with its number, from 1; the run's figures lie in its metrics.jsonl. RequestError for what cannot work,
    before anything is written; Stopped where a run had to end: what it saved is kept.
    """
    recipe = Recipe.of(recipe, overrides)
    device = launched()
    run, recipe, going_on = folder.place(recipe, out, resume)
    before: Path | None = None
    begun = ({place for place in (run, *folder.stage_folders(recipe, run)) if folder.is_run(place)}
             if going_on else set())
    with spoken(), recorded() as record, parallel.held_by_first(folder.alone(run)):
        log.info(f"checking {recipe.name}")
        for stage in recipe.stages:
            check_recipe(stage)
        check_data(recipe)
        check_card(recipe, device)
        if going_on:
            write_down(run, recipe)
        for i, place in enumerate(folder.stage_folders(recipe, run)):
            if place == run or not folder.finished(place, recipe.stages[i]):
                recipe = _treated(recipe, i, before, place, run, device, begun, record, on_step)
            before = place
    return run


def _treated(whole: Recipe, number: int, *rest: Any) -> Recipe:
    """Trains a stage of the whole recipe, and again with smaller rates where its doctor sends it back. Returns the
    recipe as it was at the end."""
    left = RELAPSES
    while True:
        try:
            _train(whole.stages[number], whole, *rest)
            return whole
        except Relapse as relapse:
            whole, left = go_back(whole, rest[1], rest[2], relapse.finding, left), left - 1


def _train(recipe: Recipe, whole: Recipe, before: Path | None, place: Path, run: Path, device: torch.device,
           begun: set[Path], record: MemoryHandler, on_step: Callable[[int], None] | None) -> None:
    """One stage, in its own folder of the run. before: the folder of the stage before. begun: folders that go on."""
    number = f"stage {len(recipe.stages)} of {len(whole.stages)}: " if len(whole.stages) > 1 else ""
    log.info(f"{number}{recipe.method}, {recipe.steps} steps; loading the teacher {recipe.teacher.base} on {device}")
    stage = setup(recipe, device, previous=None if before is None else previous_student(recipe, before))
    for later in whole.stages[len(recipe.stages):]:
        sampling(later, stage.teacher)
    log.info("loaded; comparing the student's first call with its pipeline's own")
    check_first_call(stage)
    if recipe.train.compile:
        with recipe.blaming("train.compile", "is on, and cannot be"):
            compile_blocks(stage.roles)
    log.info("preparing the data")
    with meter(parallel.rank() == 0) as report:
        stream = Stream(dataset(stage, report), recipe.data.batch, recipe.train.seed, stage.teacher.latent_shape,
                        recipe.data.caption_dropout, negatives(stage), stage.judged)
        say_long(stage, log.warning)
        stream.batch(0, "check", world=parallel.world_size(), micros=recipe.train.accumulate)
    if recipe.train.fsdp:
        shard(stage.roles)                # the data are made by now: whole networks made them
    log.info("encoding the prompts of the pictures to look at")
    trainer = Trainer(stage.method, stage.roles, stream, train_config(recipe), place,
                      [preview := Preview(stage, place), *([] if on_step is None else [on_step])], [preview.start],
                      preview.picture)
    attend(stage, trainer)
    going_on, recipes = place in begun, {run: whole, place: recipe}
    for new in [new for new in recipes if new not in begun]:
        folder.begin(new, pinned(recipes[new]), device)
        begun.add(new)
    write_in(run, record)
    log.info(f"training {recipe.train.updates:,} steps of {recipe.data.batch} samples in {place}"
             + (", compiling first, which takes minutes" if recipe.train.compile else ""))
    try:
        trainer.train(going_on)
    except Stopped as error:
        if error.not_finite is not None:
            note(place, trainer.done, recipe, error.not_finite)
        helps = f" {advice(recipe)}" if isinstance(error.__cause__, torch.OutOfMemoryError) else ""
        raise Stopped(f"{error}{helps}\nto go on: {folder.resumption(run)}", error.not_finite) from error.__cause__


@dataclass(frozen=True)
class MadePairs:
    """Where the teacher's pairs lie, how many there are, and how many of them were made just now."""

    folder: Path
    count: int
    made: int
    seconds: float


def plan(recipe: str | Path | Mapping[str, Any] | Recipe, gpu_memory: float | None = None,
         **overrides: Any) -> dict[str, Any]:
    """What a run will cost: `run.plan.plan`'s figures, in bytes. No weights are read.

    recipe, overrides: as train. gpu_memory: of a card, in bytes; then "fit" says whether the run fits it, {memory,
    fits, switches: the entries that make it fit, or all that there are, peak: with them}. RequestError for what
    training would refuse.
    """
    recipe = Recipe.of(recipe, overrides)
    found = plan_recipe(recipe)
    return (found if gpu_memory is None
            else found | {"fit": {"memory": gpu_memory, **asdict(fit_stage(recipe, found, gpu_memory))}})


@spoken()
def pairs(recipe: str | Path | Mapping[str, Any] | Recipe, *, out: str | Path | None = None,
          **overrides: Any) -> MadePairs:
    """Makes the teacher's pairs of noise and picture that a recipe trains on, those that are not there yet.

    They lie in the cache, where a training finds them, or in the folder `out`, for a recipe's data.pairs.path.
    """
    recipe = Recipe.of(recipe, overrides)
    recipe = next((stage for stage in recipe.stages if stage.data.kind == "pairs" and not stage.taught_by_previous),
                  recipe)
    if recipe.data.kind != "pairs":
        raise recipe.refuse("data", f"names {recipe.data.kind}; pairs are made for recipes that train on them, such as "
                            "data: {pairs: {prompts: shapes, solver: ddim, steps: 25}, count: 4096, batch: 64}")
    if recipe.taught_by_previous:
        raise recipe.refuse("data.pairs", "are made by the student of the stage before, once that is trained: "
                            "a training makes them")
    run, start = setup(recipe, launched()), time.perf_counter()
    log.info("making the pairs that are missing")
    with meter(parallel.rank() == 0) as report:
        cache = Cache(report=report)
        spec = pairs_spec(run, cache, out)
        missing = recipe.data.count - spec.made()
        fill_pairs(run, spec, cache)
    return MadePairs(spec.folder, recipe.data.count, missing, time.perf_counter() - start)


@spoken()
def export(run: str | Path, to: str = "lora", guidance: float | None = None, out: str | Path | None = None,
           dtype: str | None = None, *, checkpoint: int | None = None, weights: Literal["ema", "student"] | None = None,
           push: str | None = None, public: bool = False) -> Path:
    """Writes a run's student for stock diffusers, once a stock pipeline has given its pictures. Returns the folder.

    dtype: "float16", "bfloat16" or "float32" of the weights; float16 unless given, and float32 of a pipeline.
    checkpoint, weights: as of `sample`. push: the Hub repository OWNER/NAME that the folder is uploaded to, which is
    made where there is none, private unless `public`. RequestError, before anything is written, where the Hub cannot be
    asked.
    """
    if push is not None:
        hub.check(push)
    run = Path(run)
    out = run / "export" / to if out is None else Path(out)
    recipe = folder.recipe_of(run)
    check_leaves(recipe)
    check_export(to, guidance, family(recipe), needs_of(recipe)["student"].reads, recipe.student.lora is not None,
                 recipe.guidance, quantization(recipe))
    opened = open_run(run, checkpoint, weights)
    student = Student.of(opened.roles, opened.sampling_role, opened.stock, opened.recipe.method, run.resolve().name,
                         guidance=opened.recipe.guidance, base_model=(base := base_of(opened)),
                         results=folder.results_of(run), prompts=tuple(preview_prompts(opened)), step=opened.step,
                         sizes=opened.sizes, negative=example(opened.recipe))
    export_student(student, to, out, guidance, dtype, push)
    if push is not None:
        if Path(base.base).is_absolute():
            log.warning(f"the card names the teacher by its folder here, {base.base}: who reads it elsewhere has none")
        log.info(f"uploaded to {hub.push(out, push, public)}")
    return out


@spoken()
def undistil(turbo: str | Path, *, prompts: str | Path | Sequence[str] | None = None, updates: int = 2000,
             samples: int = 1000, rank: int = 32, steps: int | None = None, to: str = "diffusers",
             out: str | Path | None = None, resume: bool | Literal["auto"] = False, **overrides: Any) -> Path:
    """The adapter with which style LoRAs are trained on a few-step model: a LoRA, trained by plain denoising of the
    model's own samples. Returns its export, in the run's folder.

    turbo: an export, or a few-step pipeline; steps: its own, where no file says them. to: "diffusers", "kohya" or
    "ai-toolkit". out, resume, overrides: of the run, as of `train`. RequestError: see `run.undistil.undistilling`.
    """
    found, recipe = undistilling(turbo, prompts, updates, samples, rank, steps, to, overrides)
    run = train(recipe, out=out, resume=resume)
    if parallel.rank() == 0:
        write_card(export(run, TO[to], out=run / "export" / to), found, to, recipe)
    return run / "export" / to


@spoken()
def doctor(run: str | Path) -> list[Health]:
    """How a finished or a running run is doing, a record a stage: what ails it now, what did before, and what helps.

    Its signals are drawn into signals.png of the run's folder. RequestError for what is no run, and for one that was
    trained without the doctor.
    """
    return health(Path(run))


def extract(turbo: str | Path, base: str | Path, rank: int, out: str | Path, dtype: str | None = None) -> Extracted:
    """Writes a LoRA of what a pipeline differs from its base by, to begin from: `student: {from: OUT}`.

    turbo, base: folders or Hub ids of two pipelines of one architecture, such as a published few-step model and the one
    that it was made of. dtype: "float16", "bfloat16" or "float32" of the LoRA's weights, float16 unless given. The
    result says which share of each layer's squared difference the LoRA holds, and what no LoRA reaches.
    """
    return extract_lora(located(Source.of(turbo)), located(Source.of(base)), rank, out, dtype)


@spoken()
def check(lora: str | Path, base: str | Path, *, out: str | Path | None = None, prompts: Sequence[str] | None = None,
          samples: int = 2000, seed: int = 0, guidance: float | None = None,
          features: FeatureName | None = None, reference: str | Path | None = None) -> Checked:
    """Finds how a few-step LoRA of anybody's is called best on its base, and writes that to the folder `out`, which
    `load` accepts.

    What it says of itself is believed unless its pictures say otherwise. They are held against the `reference`: a
    folder of real pictures, "shapes", or "base", the base's own in many steps at its good `guidance`; shapes for what
    ships and base for all else, unless given. samples: pictures of the calls in the last round; features: as of
    `bench`, one kind, those of Shapes for what ships. RequestError for what is no LoRA, for one of another base, and
    for one that is better than the base in no few steps.
    """
    return check_lora(lora, Source.of(base), out=out, prompts=prompts, samples=samples, seed=seed, guidance=guidance,
                      features=None if features is None else benching.feature_spaces(features)[0],
                      reference=reference, device=launched(), say=log.info)


@spoken()
def sample(target: str | Path, prompts: str | Sequence[str], *, steps: int | None = None, seed: int = 0,
           guidance: float | None = None, out: str | Path | None = None, checkpoint: int | None = None,
           weights: Literal["ema", "student"] | None = None, plugins: str | Path | None = None,
           negative: str | None = None, with_teacher: str | None = None,
           x0: str | Path | None = None) -> list[Image.Image] | list[list[Image.Image]]:
    """Pictures of a run, an export or any pipeline, one a prompt; written to `out`, several as a sheet. Of a pipeline
    of videos the frames of each, written as a sheet with a row a video.

    steps and guidance are the student's own, and a pipeline's defaults, unless given. A picture depends on the seed and
    on its place in the list; where a pipeline's scheduler draws from the global generator, on the list's length too.
    checkpoint, weights: of a run, the step of another checkpoint than the last, and "ema" or "student", where it has
    both. plugins: a folder with the family of a pipeline. negative: a negative prompt, where the call is guided.
    with_teacher: "diversity", "distillation_pp" or "adaptive", with options as in "diversity,teacher_steps=2"; x0:
    where to draw what each of its evaluations made of the pictures. Several ranks share the prompts, without a
    teacher, and the first one writes.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    check_files(out, x0, with_teacher)
    asked = None if with_teacher is None else Asked.of(with_teacher)
    opened = open_target(target, "target", say=log.info, plugins=None if plugins is None else Folder.open(plugins),
                         checkpoint=checkpoint,
                         weights=weights)
    pipeline = opened.target.pipeline.to(launched())
    call = away_from(opened.target, call_as_asked(opened.target, steps, guidance, log.info), negative)
    say_cut(type(pipeline), pipeline.components, texts, call, log.warning)
    pipeline.set_progress_bar_config(disable=True)
    pixels = draw(opened, call, texts, seed, asked, x0)
    check_pictures(pixels, target)
    drawn = as_pil(pixels) if pixels.ndim == 4 else [as_pil(frames) for frames in pixels]
    if out is not None and parallel.rank() == 0:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        drawn[0].save(out) if pixels.ndim == 4 and len(drawn) == 1 else sheet(pixels * 2 - 1, out)
    return drawn


@spoken()
def bench(*targets: str | Path, nfe: Sequence[int] | None = None, samples: int | None = None,
          out: str | Path = "bench", seed: int = 0, guidance: Sequence[float] | None = None,
          solvers: Sequence[str] = tuple(SOLVERS), features: FeatureName | FeatureNames | None = None,
          reference: str | Path | None = None, prompts: Sequence[str] | None = None,
          reuse: Sequence[str | Path] = (), few_step: Sequence[str | Path] = (), metrics: Sequence[str] = (),
          plugins: str | Path | None = None, compose: Sequence[str | Path] = (),
          scales: Sequence[float] | None = None, with_teacher: str | None = None) -> dict[str, Any]:
    """Quality and latency against network evaluations: the table of results.json, written to `out` with report.html.

    nfe: the network evaluations, 1, 2, 4 and 8 unless given. features: "inception", the folder of a CLIPModel or of
    a Dinov2Model, a module of one's own (pixels (B, 3, H, W) in [-1, 1] -> (B, dim)), or several of them, since one
    alone misranks: all figures are of the first, distances are in the others too. reference: "shapes" or a folder
    of real pictures, against which distances are taken of 2,000 `samples` in `features`, those of
    assets/shapes-clip unless given; or "teacher", the teacher's own pictures from the same noise, of 16 samples:
    shapes for what ships and the teacher for all else, unless given. The teachers of students stand in the table
    too, at `guidance`, or without guidance and at the scale that the student was trained for: of the two the better
    one at each count is what a student should be held against. few_step: further targets, few-step pipelines that
    others made: they keep their scheduler and are called without guidance. metrics: what people prefer
    ("pickscore", "hpsv2=FOLDER", "shapes_reward"), or figures of plugins by name; plugins: a folder with them, or
    with the families of pipelines. Videos are measured beside their teacher's own. with_teacher: as of `sample`;
    beside the rows of each student stand those with its teacher's help, at the evaluations of both.

    compose: other LoRAs (folders, .safetensors files or Hub ids) that one student wears, each at the strengths
    `scales`, 0.5, 0.75 and 1 unless given: instead of the above, the student in its own steps and its teacher are
    drawn with and without each, and a verdict says whether its style and the variety of seeds are kept. `guidance`
    is then that of the student, and `samples` are 64 unless given.
    """
    told = {"samples": samples, "out": out, "seed": seed, "guidance": guidance, "solvers": solvers,
            "features": features, "prompts": prompts, "metrics": metrics, "plugins": plugins}
    beside = {"nfe": nfe, "reference": reference, "reuse": reuse, "few_step": few_step, "with_teacher": with_teacher}
    if compose:
        return composing.compose(targets, compose, scales=scales, unused=beside, **told)
    if scales is not None:
        raise RequestError(f"--scales {','.join(f'{s:g}' for s in scales)}: are the strengths of LoRAs that a student "
                           "wears: name these by --compose, or leave it out")
    return benching.bench(targets, **beside | {"nfe": nfe or NFE}, **told)


def quiet() -> None:
    """For commands: the notices and loading bars of diffusers and transformers are not theirs to show."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)      # of each cast in each layer
