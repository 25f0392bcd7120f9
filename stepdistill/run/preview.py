"""What is looked at while a run trains: pictures from fixed noise, and figures where a reference is given."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import parallel, resources
from ..diffusion.contracts import Condition, Role
from ..diffusion.guidance import guided
from ..diffusion.solvers import dpmpp_2m
from ..diffusion.times import even
from ..evaluation.clouds import cloud, points_of
from ..evaluation.plans import plans
from ..evaluation.sheets import sheet
from ..evaluation.sweep import Evaluation
from ..methods.base import due
from ..models.stock import some_frames
from ..training import checkpoints
from ..training.tracking import truncate
from .data import noises, preview_prompts
from .setup import Run
from .targets import student_target

TEACHER_STEPS = 25
CLOUD = 2000                                          # points of a picture of Toy
FIGURES = "evaluations.jsonl"


class Preview:
    """Called after every step; speaks when evaluate.every is due and after the last one. Rank 0 alone works, unless the base is sharded:
    then all ranks take part in its passes, and rank 0 alone writes."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.cond = run.teacher.encode(preview_prompts(run, CLOUD if run.teacher.family.samples == "points" else 4))
        self.teacher: Tensor | None = None
        choices = run.recipe.evaluate
        self.figures: Evaluation | None = None
        if parallel.rank() == 0:                      # a resumed run forgets what came after its checkpoint
            saved = checkpoints.latest(folder)
            truncate(folder / FIGURES, 0 if saved is None else checkpoints.step_of(saved))
        if choices.reference is not None and parallel.rank() == 0:
            self.figures = Evaluation(choices.samples, run.recipe.train.seed,
                                      features=resources.locate(choices.features) or choices.features,
                                      reference=choices.reference, say=lambda text: None)

    def __call__(self, step: int) -> None:
        recipe = self.run.recipe
        if not (due(step, recipe.evaluate.every) or step == recipe.train.updates):
            return
        if parallel.rank() and not recipe.train.fsdp:
            return
        self.pictures(step)
        if self.figures is not None:
            self.measure(step)

    @torch.no_grad()
    def pictures(self, step: int) -> None:
        """samples/step-000200.png: the teacher's row above the student's, from the same noise; of videos a pair of rows each."""
        if self.teacher is None:
            self.teacher = self.seen(base_samples(self.run, self.noise, self.cond, self.run.guidance))
        student = self.seen(student_samples(self.run, self.noise, self.cond))
        if parallel.rank():
            return
        rows = [f"teacher, {TEACHER_STEPS} steps", f"student, {self.run.recipe.steps} steps"]
        path = self.folder / "samples" / f"step-{step:06d}.png"
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

    def measure(self, step: int) -> None:
        """A line a row in evaluations.jsonl: the student at each of evaluate.nfe."""
        target = student_target(self.run, "student")
        for plan in plans(target, self.run.recipe.evaluate.nfe, (self.run.guidance,), (), lambda text: None):
            row, _ = self.figures.row(plan)
            with (self.folder / FIGURES).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")

    def noise(self, name: str) -> Tensor:
        """(B, ...) unit normal, the same at every preview."""
        return noises(self.run, "watch", name, torch.arange(len(self.cond)))


def student_samples(run: Run, noise: Callable[[str], Tensor], cond: Condition) -> Tensor:
    """Latents of the student as it will be sampled."""
    sampler, role = run.method.sampler, run.roles[run.sampling_role]
    if "w" in run.roles.reads[run.sampling_role]:
        cond = cond.replace(w=torch.full((len(cond),), run.guidance, device=run.device))
    return sampler(role, noise("start"), cond, lambda i: noise(f"step {i}"))


def base_samples(run: Run, noise: Callable[[str], Tensor], cond: Condition, scale: float) -> Tensor:
    """Latents of the pipeline that is distilled by DPM-Solver++(2M)."""
    role: Role = guided(run.roles.base, scale)
    return dpmpp_2m(role, noise("start"), even(TEACHER_STEPS), cond)
