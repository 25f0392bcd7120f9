"""What is looked at while a run trains: pictures from fixed noise, and figures where a reference is given."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import parallel, resources
from .diffusion.contracts import Condition, Role
from .diffusion.draws import key
from .diffusion.guidance import guided
from .diffusion.solvers import dpmpp_2m
from .evaluation.clouds import cloud, points_of
from .evaluation.plans import plans
from .evaluation.sheets import sheet
from .evaluation.sweep import Evaluation
from .methods.base import due
from .training import checkpoints
from .training.tracking import truncate

if TYPE_CHECKING:
    from .work import Work

TEACHER_STEPS = 25
CLOUD = 2000                                          # points of a picture of Toy
FIGURES = "evaluations.jsonl"


class Watch:
    """Called after every step; speaks when evaluate.every is due and after the last one. Rank 0 alone works."""

    def __init__(self, work: Work, run: Path, prompts: list[str]) -> None:
        self.work, self.run = work, run
        self.cond = work.family.encode(prompts)
        self.teacher: Tensor | None = None
        asked = work.recipe.evaluate
        self.figures: Evaluation | None = None
        if parallel.rank() == 0:                      # a resumed run forgets what came after its checkpoint
            saved = checkpoints.latest(run)
            truncate(run / FIGURES, 0 if saved is None else checkpoints.step_of(saved))
        if asked.reference is not None and parallel.rank() == 0:
            self.figures = Evaluation(asked.samples, work.recipe.train.seed, features=resources.locate(asked.features) or asked.features,
                                      reference=asked.reference, say=lambda text: None)

    def __call__(self, step: int) -> None:
        recipe = self.work.recipe
        if parallel.rank() or not (due(step, recipe.evaluate.every) or step == recipe.train.updates):
            return
        self.pictures(step)
        if self.figures is not None:
            self.measure(step)

    @torch.no_grad()
    def pictures(self, step: int) -> None:
        """samples/step-000200.png: the teacher's row above the student's, from the same noise."""
        if self.teacher is None:
            self.teacher = self.work.family.decode(base_samples(self.work, self.noise, self.cond, self.work.scale))
        student = self.work.family.decode(student_samples(self.work, self.noise, self.cond))
        rows = (f"teacher, {TEACHER_STEPS} steps", f"student, {self.work.recipe.steps} steps")
        path = self.run / "samples" / f"step-{step:06d}.png"
        if self.work.family.family.samples == "points":
            cloud({row: (points_of(drawn), self.cond.label) for row, drawn in zip(rows, (self.teacher, student))}, path)
        else:
            sheet([self.teacher, student], path, rows)

    def measure(self, step: int) -> None:
        """A line a row in evaluations.jsonl: the student at each of evaluate.nfe."""
        target = self.work.target("student")
        for plan in plans(target, self.work.recipe.evaluate.nfe, (self.work.scale,), (), lambda text: None):
            row, _ = self.figures.row(plan)
            with (self.run / FIGURES).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")

    def noise(self, name: str) -> Tensor:
        """(B, ...) unit normal, a function of the name and the run's seed."""
        shape, seed, device = self.work.family.latent_shape, self.work.recipe.train.seed, self.work.device
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(key(seed, "watch", name, i))) for i in range(len(self.cond))]
        return torch.stack(draws).to(device)


def student_samples(work: Work, noise: Callable[[str], Tensor], cond: Condition) -> Tensor:
    """Latents of the student as it will be sampled."""
    sampler, role = work.method.sampler, work.roles[work.best]
    if "w" in role.reads:
        cond = cond.replace(w=torch.full((len(cond),), work.scale, device=work.device))
    return sampler(role, noise("start"), cond, lambda i: noise(f"step {i}"))


def base_samples(work: Work, noise: Callable[[str], Tensor], cond: Condition, scale: float) -> Tensor:
    """Latents of the pipeline that is distilled by DPM-Solver++(2M)."""
    role: Role = guided(work.roles.base, scale)
    return dpmpp_2m(role, noise("start"), torch.linspace(1, 0, TEACHER_STEPS + 1, dtype=torch.float64), cond)
