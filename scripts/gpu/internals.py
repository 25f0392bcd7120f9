"""All that these scripts take from inside the package, so that a rename there is one edit here."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.api import plan, quiet, train
from stepdistill.data.shapes import render, scenes
from stepdistill.data.stream import Stream
from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.draws import key
from stepdistill.diffusion.solvers import heun
from stepdistill.diffusion.times import karras
from stepdistill.errors import RequestError, Stopped
from stepdistill.evaluation import sweep
from stepdistill.evaluation.counting import counted, denoiser_of
from stepdistill.evaluation.fd import Moments, Reference, frechet, frechet_infinity
from stepdistill.evaluation.plans import Plan
from stepdistill.evaluation.sheets import sheet
from stepdistill.export.dtypes import save_pipeline
from stepdistill.models.compiled import compile_blocks
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.recipe.catalogue import builtin
from stepdistill.recipe.yaml import parse_set
from stepdistill.run.data import dataset
from stepdistill.run.folder import finished, is_run, recipe_of, stage_folders, state_of
from stepdistill.run.setup import setup, train_config
from stepdistill.run.targets import open_target, student_target
from stepdistill.training import Trainer

__all__ = ["Moments", "Recipe", "Reference", "RequestError", "Stopped", "bench_student", "builtin", "compiled",
           "fill_cache",
           "finished", "frechet", "frechet_infinity", "is_run", "open_trainer", "parse_set", "plan", "quiet",
           "recipe_of", "save_pipeline",
           "shapes", "sheet",
           "stage_folders", "student_draws", "teacher_draws", "train"]

Draw = Callable[[Sequence[str], Tensor], Tensor]      # prompts and numbers of samples -> (B, 3, H, W) in [-1, 1]


ROWS = 8                              # of data: more would count in what a card holds


@dataclass(frozen=True)
class RandomData:
    """Cached latents and conditions, as training finds them on the device: noise in the shapes of the teacher's."""

    x0: Tensor
    cond: Condition

    @property
    def count(self) -> int:
        return len(self.x0)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Condition]:
        rows = indices.to(self.x0.device, non_blocking=True)
        return self.x0[rows], self.cond[rows]

    def pairs(self, indices: Tensor) -> None:
        return None


def open_trainer(asked: Mapping[str, Any], device: torch.device, folder: Path, prompt: str = "prompt") -> Trainer:
    """A trainer of this recipe on random data, ready for `trainer.step(0)`; its roles are `trainer.roles`."""
    recipe = Recipe.load(asked)
    run = setup(recipe, device)
    cond = run.teacher.encode([f"{prompt} {i}" for i in range(ROWS)])
    x0 = torch.randn(len(cond), *run.teacher.latent_shape, device=device)
    float32 = cond.map(lambda value: value.float() if value.is_floating_point() else value)
    stream = Stream(RandomData(x0, float32), recipe.data.batch, recipe.train.seed, run.teacher.latent_shape)
    return Trainer(run.method, run.roles, stream, train_config(recipe), folder)


def compiled(trainer: Trainer) -> None:
    """Compiles the blocks of a trainer's networks, and warms up every state."""
    compile_blocks(trainer.roles)
    trainer.warm_up()


def bench_student(run: Path, nfe: list[int], samples: int, out: Path, reuse: list[Path],
                  device: torch.device) -> dict[str, Any]:
    """Results of a run's student alone; the teacher's rows are those of `reuse`."""
    target = open_target(run, "student").target
    target.pipeline.to(device)
    return sweep.bench([target], nfe, samples, out, reuse=reuse, device=device)


def shapes(count: int, size: int) -> Tensor:
    """Pictures of Shapes: (count, 3, size, size) uint8."""
    return ((render(scenes(torch.arange(count), 0), size) + 1) * 127.5).round().to(torch.uint8)


def teacher_draws(folder: Path, steps: int, device: torch.device, seed: int = 0) -> Draw:
    """A teacher by EDM's clock as it draws by Heun's rule on Karras' grid, in 2 steps - 1 evaluations."""
    teacher = load_teacher(folder, torch.float32, device)
    role, grid = (Denoiser(teacher, teacher.network),
                  torch.cat([karras(teacher.schedule, steps), torch.zeros(1, dtype=torch.float64)]))

    @torch.inference_mode()
    def draw(prompts: Sequence[str], ids: Tensor) -> Tensor:
        noise = [torch.randn(teacher.latent_shape, generator=torch.Generator().manual_seed(key(seed, "sample", i)))
                 for i in ids.tolist()]
        return teacher.pixels(heun(role, torch.stack(noise).to(device), grid, teacher.encode(list(prompts))))
    return draw


def student_draws(run: Path, steps: int, device: torch.device, seed: int = 0) -> Draw:
    """A run's student as a stock pipeline draws it in so many steps, from the noises of `teacher_draws`."""
    opened = setup(Recipe.load(recipe_of(run).resolved(), {"steps": steps}), torch.device("cpu"), torch.float32,
                   attention="auto")
    opened.roles.load_state_dict(opened.sampling_role, state_of(run, opened.sampling_role)[1])
    target = student_target(opened, "student")
    target.pipeline.to(device).set_progress_bar_config(disable=True)
    asked = Plan(target, target.name, target.pipeline.scheduler, target.call, steps, steps, 1.0)

    def draw(prompts: Sequence[str], ids: Tensor) -> Tensor:
        with counted(denoiser_of(target.pipeline)) as evaluations:
            pixels = asked.images(prompts, ids, seed)
        if evaluations[0] != steps * len(ids):
            raise RuntimeError(f"a picture of {steps} steps took {evaluations[0] / len(ids):g} evaluations")
        return pixels
    return draw


def fill_cache(recipe: Recipe, device: torch.device) -> None:
    """Makes whatever this recipe keeps on disk."""
    dataset(setup(recipe, device))
