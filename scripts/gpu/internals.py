"""All that these scripts take from inside the package, so that a rename there is one edit here."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.build import open_target, quiet, train
from stepdistill.data.stream import Stream
from stepdistill.diffusion.contracts import Condition
from stepdistill.evaluation import sweep
from stepdistill.models.compiled import compile_blocks
from stepdistill.plan import plan
from stepdistill.recipe import Recipe, builtin
from stepdistill.runs import finished, folders, is_run
from stepdistill.training import TrainConfig, Trainer
from stepdistill.work import dataset, make, rates

__all__ = ["Recipe", "bench_student", "builtin", "compiled", "fill_cache", "finished", "folders", "is_run", "open_trainer", "plan", "quiet", "train"]


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
    work = make(recipe, device)
    cond = work.family.encode([f"prompt {i}" for i in range(64)])
    x0 = torch.randn(len(cond), *work.family.latent_shape, device=device)
    float32 = cond.map(lambda value: value.float() if value.is_floating_point() else value)
    stream = Stream(RandomData(x0, float32), recipe.data.batch, recipe.train.seed, work.family.latent_shape)
    config = TrainConfig(**recipe.train.model_dump(exclude={"ema", "gradient_checkpointing", "attention"}), rates=rates(recipe))
    return Trainer(work.method, work.roles, stream, config, folder)


def compiled(trainer: Trainer) -> None:
    """Compiles the blocks of a trainer's networks, and warms up every state."""
    compile_blocks(trainer.roles)
    trainer.warm_up()


def bench_student(run: Path, nfe: list[int], samples: int, out: Path, reuse: list[Path], device: torch.device) -> dict[str, Any]:
    """Results of a run's student alone; the teacher's rows are those of `reuse`."""
    target = open_target(run, "student").target
    target.pipeline.to(device)
    return sweep.bench([target], nfe, samples, out, reuse=reuse, device=device)


def fill_cache(recipe: Recipe, device: torch.device) -> None:
    """Makes whatever this recipe keeps on disk."""
    dataset(make(recipe, device))
