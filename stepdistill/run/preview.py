"""What is looked at while a run trains: pictures from fixed noise, and figures where a reference is given."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import parallel
from ..diffusion.contracts import Condition, Role
from ..diffusion.guidance import guided
from ..diffusion.solvers import dpmpp_2m
from ..diffusion.times import even
from ..evaluation.clouds import cloud, points_of
from ..evaluation.plans import plans
from ..evaluation.report import in_words, row_key
from ..evaluation.sheets import sheet
from ..evaluation.sweep import Evaluation
from ..files import records
from ..methods.base import due
from ..models.stock import some_frames
from ..training.tracking import truncate
from .checks import found, reference_source
from .data import captions, noises, preview_prompts
from .folder import picture_of
from .setup import Run
from .targets import student_target
from .telling import log

TEACHER_STEPS = 25
CLOUD = 2000                                          # points of a picture of Toy
FIGURES = "evaluations.jsonl"


class Preview:
    """Called after every step; speaks when evaluate.every is due and after the last one. Rank 0 alone works, unless the
    base is sharded: then all ranks take part in its passes, and rank 0 alone writes."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.cond = run.teacher.encode(preview_prompts(run, CLOUD if run.teacher.family.samples == "points" else 4))
        self.teacher: Tensor | None = None
        choices = run.recipe.evaluate
        self.figures: Evaluation | None = None
        if choices.reference is not None and parallel.rank() == 0:
            self.figures = Evaluation(choices.samples, run.recipe.train.seed,
                                      prompts=figure_prompts(run), features=[found(choices.features)],
                                      reference=found(choices.reference), device=run.device, say=log.debug)

    def __call__(self, step: int) -> None:
        if self._speaks(step):
            self.pictures(step)
            if self.figures is not None:
                self.measure(step, set())

    def start(self, done: int) -> None:
        """Before the first step: forgets the figures after `done`, and makes what a killed run owes of that step."""
        measured = [] if parallel.rank() else truncate(self.folder / FIGURES, done, records.Evaluated)
        if not done or not self._speaks(done):
            return
        if self.run.recipe.train.fsdp or not self.picture(done).is_file():        # sharded, all ranks must decide alike
            self.pictures(done)
        if self.figures is not None:
            self.measure(done, {row_key(row) for row in measured if row["step"] == done})

    def _speaks(self, step: int) -> bool:
        recipe = self.run.recipe
        return ((due(step, recipe.evaluate.every) or step == recipe.train.updates)
                and (parallel.rank() == 0 or recipe.train.fsdp))

    def picture(self, step: int) -> Path:
        return picture_of(self.folder, step)

    @torch.no_grad()
    def pictures(self, step: int) -> None:
        """samples/step-000200.png: the teacher's row above the student's, from the same noise; of videos a pair of rows
        each."""
        if self.teacher is None:
            self.teacher = self.seen(base_samples(self.run, self.noise, self.cond, self.run.guidance))
        student = self.seen(student_samples(self.run, self.noise, self.cond))
        if parallel.rank():
            return
        rows = [f"teacher, {TEACHER_STEPS} steps", f"student, {self.run.recipe.steps} steps"]
        path = self.picture(step)
        if self.run.teacher.family.samples == "points":
            cloud({row: (points_of(drawn), self.cond.label) for row, drawn in zip(rows, (self.teacher, student))}, path)
        elif self.run.teacher.family.video is None:
            sheet([self.teacher, student], path, rows)
        else:
            sheet(torch.stack([self.teacher, student], 1).flatten(0, 1), path, rows * len(student))

    def seen(self, latents: Tensor) -> Tensor:
        """Their pixels, of videos those of the frames that are looked at; points as they are."""
        pixels = self.run.teacher.decode(latents)
        return pixels if self.run.teacher.family.video is None else some_frames(pixels)

    def measure(self, step: int, measured: set[tuple[str, int, float | None]]) -> None:
        """A line a row in evaluations.jsonl: the student at each of evaluate.nfe. measured: the rows that are there."""
        target = student_target(self.run, "student")
        every = plans(target, self.run.recipe.evaluate.nfe, (self.run.guidance,), (), lambda text: None)
        for plan in [plan for plan in every if plan.key not in measured]:
            row, _ = self.figures.row(plan)
            with (self.folder / FIGURES).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")
            log.info(f"step {step:,}: {in_words(row)}")

    def noise(self, name: str) -> Tensor:
        """(B, ...) unit normal, the same at every preview."""
        return noises(self.run, "watch", name, torch.arange(len(self.cond)))


def figure_prompts(run: Run) -> list[str] | None:
    """What the figures are drawn for: None for the captions of the reference, the data's where it has none."""
    if reference_source(run.recipe).captioned:
        return None
    known, samples = captions(run), run.recipe.evaluate.samples
    return known.captions(torch.arange(samples if known.count is None else min(known.count, samples)))


def student_samples(run: Run, noise: Callable[[str], Tensor], cond: Condition, role: str | None = None) -> Tensor:
    """Latents of the student as it will be sampled; role: of its average, unless given."""
    name = role or run.sampling_role
    student, reads = run.roles[name], run.roles.reads[name]
    sampler = run.method.sampler.fitted(student)
    if "r" in reads:
        student = sampler.telling(student)
    if "w" in reads:
        cond = cond.replace(w=torch.full((len(cond),), run.guidance, device=run.device))
    return sampler(run.called(student, reads), noise("start"), cond, lambda i: noise(f"step {i}"))


def base_samples(run: Run, noise: Callable[[str], Tensor], cond: Condition, scale: float) -> Tensor:
    """Latents of the pipeline that is distilled by DPM-Solver++(2M)."""
    role: Role = guided(run.roles.base, scale)
    return dpmpp_2m(role, noise("start"), even(TEACHER_STEPS), cond)
