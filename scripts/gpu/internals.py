"""All that these scripts take from inside the package, so that a rename there is one edit here."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.api import plan, quiet, train
from stepdistill.data.stream import Stream
from stepdistill.diffusion.contracts import Condition
from stepdistill.evaluation import sweep
from stepdistill.models.compiled import compile_blocks
from stepdistill.recipe import Recipe
from stepdistill.recipe.catalogue import builtin
from stepdistill.run.data import dataset
from stepdistill.run.folder import finished, is_run, stage_folders
from stepdistill.run.setup import setup, train_config
from stepdistill.run.targets import open_target
from stepdistill.training import Trainer

__all__ = ["Recipe", "bench_student", "builtin", "compiled", "fill_cache", "finished", "is_run", "open_trainer",
           "plan", "quiet",
           "stage_folders", "train"]


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


def open_trainer(asked: Mapping[str, Any], device: torch.device, folder: Path) -> Trainer:
    """A trainer of this recipe on random data, ready for `trainer.step(0)`; its roles are `trainer.roles`."""
    recipe = Recipe.load(asked)
    run = setup(recipe, device)
    cond = run.teacher.encode([f"prompt {i}" for i in range(ROWS)])
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


def fill_cache(recipe: Recipe, device: torch.device) -> None:
    """Makes whatever this recipe keeps on disk."""
    dataset(setup(recipe, device))
