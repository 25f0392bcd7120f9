"""A base's own pictures at its ease, which stand for real ones where there are none."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation.own import STEPS
from ..evaluation.plans import Plan
from ..evaluation.protocol import fingerprint


@dataclass(frozen=True)
class OwnPictures:
    """Of a plan of the base, as `evaluation.reference.load_reference` reads a source: computed once, and kept in the
    cache.

    asked: prompts, one after the other, over again.
    """

    plan: Plan
    asked: tuple[str, ...]
    count: int
    seed: int
    batch: int
    captioned: bool = True

    @property
    def name(self) -> str:
        plan = self.plan
        made = fingerprint([plan.target.identity, plan.name, STEPS, plan.guidance, str(plan.call), list(self.asked),
                            self.seed, self.batch])
        return f"{plan.name} of {plan.target.name}:{self.count}@{made}"

    def pictures(self) -> Iterator[Tensor]:
        for ids in torch.arange(self.count).split(self.batch):
            pixels = self.plan.images(self.prompts(int(ids[-1]) + 1)[int(ids[0]):], ids, self.seed)
            self.plan.check_finite(int((~pixels.isfinite().flatten(1).all(1)).sum()), len(pixels))
            yield pixels

    def prompts(self, count: int) -> list[str]:
        return [self.asked[i % len(self.asked)] for i in range(count)]

    def real(self, count: int) -> Iterator[Tensor]:
        return iter(())

    def alike(self, prompts: int, each: int) -> None:
        return None
