"""A feature space with its reference: the distances that are taken in it."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .estimate import Estimate
from .fd import Reference, frechet_infinity, too_few
from .features import Features, load_features
from .kernels import cmmd, kid
from .manifolds import manifolds
from .reference import REFERENCE_FILE, Source, load_reference

Figures = dict[str, float | None]
FeatureName = Path | str | torch.nn.Module        # as `load_features` takes it
FeatureNames = Sequence[FeatureName]


def figures(name: str, estimate: Estimate | None) -> Figures:
    """As a row of results.json has it: name, name_low and name_high; of what was not measured only the name."""
    return {name: None} if estimate is None else estimate.named(name)


def shipped_reference(name: FeatureName) -> Path | None:
    """Where a folder of features keeps the statistics of pictures that ship with it."""
    return None if isinstance(name, torch.nn.Module) or str(name) == "inception" else Path(name) / REFERENCE_FILE


@dataclass(frozen=True)
class Space:
    features: Features
    reference: Reference

    @classmethod
    def load(cls, name: FeatureName, source: Source, device: str | torch.device,
             say: Callable[[str], None]) -> Space:
        features = load_features(name, device)
        return cls(features, load_reference(features, source, shipped_reference(name), say))

    def distances(self, images: Tensor, seed: int) -> Figures:
        """images: features (n, D). A Fréchet distance of too few samples would mean nothing: then it is None."""
        subset = self.reference.subset
        fd = (None if too_few(len(images), self.reference.whole.count, self.features.dim)
              else frechet_infinity(images, self.reference, seed))
        found = figures("fd", fd) if fd else {"fd": None, "fd_low": None, "fd_high": None}
        found |= figures("kid", kid(images, subset)) | figures("cmmd", cmmd(images, subset)
                                                               if self.features.clip else None)
        for name, estimate in manifolds(images, subset).items():
            found |= figures(name, estimate)
        return found
