"""Distances between sets of pictures by the features of the classifier, and the ratio of two of them with its
interval."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import internals
import torch
from cifar_data import CLASSES, levels, scaled
from cifar_train import Classifier
from torch import Tensor

BLOCK, RESAMPLES, SUBSET = 1000, 200, 2000
SHOWN = 80                            # pictures on a sheet, ten classes a row

Draw = Callable[[list[str], Tensor], Tensor]          # prompts and numbers of samples -> (B, 3, H, W) in [-1, 1]


@torch.inference_mode()
def features(network: Classifier, pixels: Tensor) -> Tensor:
    """pixels (N, 3, H, W) uint8, on any device -> (N, D) float32 on the CPU."""
    device = network.last.weight.device
    return torch.cat([network.features(scaled(block.to(device))).cpu() for block in pixels.split(BLOCK)])


def drawn(draw: Draw, count: int) -> Tensor:
    """(count, 3, H, W) uint8 on the CPU. Sample i is of class i modulo 10, in every row from the same noise."""
    return torch.cat([levels(draw([f"class {i % CLASSES}" for i in ids.tolist()], ids)).cpu()
                      for ids in torch.arange(count).split(BLOCK)])


def reference(real: Tensor) -> internals.Reference:
    """real: features (M, D)."""
    moments = internals.Moments
    return internals.Reference((moments.of(real[0::2]), moments.of(real[1::2])),
                               real[:: max(1, len(real) // SUBSET)][:SUBSET].clone())


def distance(found: Tensor, real: Tensor) -> dict[str, float]:
    """The Fréchet distance at infinitely many samples of features (n, D) to real ones (M, D), with its interval of 95
    %."""
    return asdict(internals.frechet_infinity(found, reference(real)))


@dataclass(frozen=True)
class Ratio:
    """low, high: of the interval of 95 %; none where the lower distance of the two may as well be 0."""

    value: float
    low: float | None
    high: float | None


def ratio(student: Tensor, teacher: Tensor, real: Tensor, values: tuple[float, float], device: torch.device,
          seed: int = 0) -> Ratio:
    """Of the student's distance to the teacher's, which are `values`; features (n, D), (n, D) and (M, D).

    Row i of both was drawn from one noise, and both are compared with the same pictures: each resample takes the same
    rows of student and teacher and the same pictures for both. A resample's distance is too large by what resampling
    adds, so it counts only by how far it lies from the mean of all.
    """
    x, y, z = (one.to(device, torch.float64) for one in (student, teacher, real))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(RESAMPLES):
        rows, pictures = (_times(len(one), generator).to(device) for one in (x, z))
        against = _moments(z, pictures)
        found.append(torch.stack([internals.frechet(own.mean, own.covariance, against)
                                  for own in (_moments(x, rows), _moments(y, rows))]))
    draws = torch.stack(found).cpu()
    over, under = (draws - draws.mean(0) + torch.tensor(values, dtype=torch.float64)).unbind(1)
    low, high = torch.quantile(over / under, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    sure = (under <= 0).double().mean() < 0.025 / 2
    return Ratio(values[0] / values[1], *((low, high) if sure else (None, None)))


def _times(count: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` rows is drawn when so many are drawn with replacement."""
    return torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count).double()


def _moments(x: Tensor, weight: Tensor) -> internals.Moments:
    mean = weight @ x / len(x)
    centred = x - mean
    return internals.Moments(len(x), mean, (centred * weight[:, None]).T @ centred / (len(x) - 1))
