"""Toy: a mixture in the plane whose teacher is known in closed form. A folder says which; `write` draws one from a
seed.

A point is a sample of shape (2, 1, 1), so that it goes where latents go. Its prompt names its class; each class is a
few long, thin components, and "" is all of them.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError
from ..files import records
from .draws import fractions, key
from .exact import Gaussian, GaussianMixture
from .schedule import Schedule

CLASSES, MODES = 2, 3                       # of the drawn problem; modes are those of one class
SHAPE = (2, 1, 1)
FILE = "toy.json"
SCHEDULERS = {                              # of the drawn problem's noise: how the teacher's folder tells it to
                                            # diffusers
    "vp": {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
           "clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing",
           "prediction_type": "v_prediction"},
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
}


def is_toy(name: str | Path) -> bool:
    """Whether it is a folder of this kind."""
    return (Path(name) / FILE).is_file()


def write(folder: str | Path, seed: int, noise: str) -> Path:
    """A teacher's folder of a mixture drawn from the seed. noise: "vp" or "flow".

    Six components on a ring, their standard deviations from 0.06 to 0.35 in any direction; all in all the mean is 0 and
    the variance 1 in each direction.
    """
    folder, generator = Path(folder), torch.Generator().manual_seed(key(seed, "toy"))
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    count = CLASSES * MODES
    around = (torch.arange(count) + uniform(-0.3, 0.3, count)) / count + uniform(0, 1)
    means = uniform(1.1, 1.7, count, 1) * torch.stack([(2 * torch.pi * around).cos(), (2 * torch.pi * around).sin()], 1)
    turn = torch.pi * uniform(0, 1, count)
    axes = torch.stack([torch.stack([turn.cos(), -turn.sin()], 1), torch.stack([turn.sin(), turn.cos()], 1)], 1)
    deviations = torch.stack([uniform(0.2, 0.35, count), uniform(0.06, 0.12, count)], 1)
    covariances = axes @ torch.diag_embed(deviations**2) @ axes.mT
    weights = uniform(0.6, 1.4, count)
    labels = torch.randperm(count, generator=generator) % CLASSES
    whole = {"seed": seed, "noise": noise, "labels": labels.tolist(), "weights": (weights / weights.sum()).tolist()}
    means, covariances = _standardised(weights / weights.sum(), means, covariances)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    _write_config(folder / FILE, whole | {"means": means.tolist(), "covariances": covariances.tolist()})
    _write_config(folder / "model_index.json", {"_class_name": "Toy",
                                                "scheduler": ["diffusers", SCHEDULERS[noise]["_class_name"]]})
    _write_config(folder / "scheduler" / "scheduler_config.json", SCHEDULERS[noise])
    return folder


def _standardised(weights: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    means = means - weights @ means
    total = (weights[:, None, None] * (covariances + means[:, :, None] * means[:, None, :])).sum(0)
    values, vectors = torch.linalg.eigh(total)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    return means @ whiten.T, whiten @ covariances @ whiten.T


def _write_config(path: Path, what: dict) -> None:
    path.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Toy:
    """The mixture of a folder. Captions, an endless row of captioned points, and the law itself."""

    folder: Path
    seed: int = 0
    count: int | None = None

    @cached_property
    def config(self) -> records.Toy:
        return records.read(Path(self.folder) / FILE, records.Toy, "Write the folder anew")

    @cached_property
    def labels(self) -> Tensor:
        return torch.tensor(self.config["labels"])

    @property
    def identity(self) -> dict[str, object]:
        return {"toy": self.config, "seed": self.seed}

    def law(self, schedule: Schedule, kind: str) -> GaussianMixture:
        """Of x_0 (B, 2, 1, 1), as a teacher that answers in `kind`."""
        means, covariances = (torch.tensor(self.config[name], dtype=torch.float64) for name in ("means", "covariances"))
        parts = [Gaussian(schedule, mean.reshape(SHAPE), covariance, kind)
                 for mean, covariance in zip(means, covariances)]
        return GaussianMixture(torch.tensor(self.config["weights"], dtype=torch.float64), parts, self.labels, kind)

    def points(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 (B, 2, 1, 1) float32 of numbered samples, and their labels (B,)."""
        drawn = fractions(key(self.seed, "toy point"), indices, 3)
        which = torch.searchsorted(torch.tensor(self.config["weights"], dtype=torch.float64).cumsum(0)[:-1],
                                   drawn[:, 0].contiguous())
        z, means, roots = torch.special.ndtri(drawn[:, 1:]), *self._shapes
        return (means[which] + (roots[which] @ z[:, :, None])[:, :, 0]).float().reshape(-1, *SHAPE), self.labels[which]

    @cached_property
    def _shapes(self) -> tuple[Tensor, Tensor]:
        means, covariances = (torch.tensor(self.config[name], dtype=torch.float64) for name in ("means", "covariances"))
        return means, torch.linalg.cholesky(covariances)

    def captions(self, indices: Tensor) -> list[str]:
        return [caption(label) for label in self.points(indices)[1].tolist()]

    def pixels(self, indices: Tensor) -> Tensor:
        """The points themselves: nothing is drawn."""
        return self.points(indices)[0]


def caption(label: int) -> str:
    return f"class {label}"


def labels_of(prompts: list[str], classes: int) -> Tensor:
    """Captions, or "" for -1, back to labels (B,). RequestError for any other prompt."""
    known = {caption(label): label for label in range(classes)} | {"": -1}
    if unknown := sorted(set(prompts) - known.keys()):
        raise RequestError(f"Toy knows no prompt {unknown[0]!r}: its prompts are {', '.join(known)[:-2]} and the empty "
                           "one")
    return torch.tensor([known[prompt] for prompt in prompts])
