"""Which samples each moment of training sees: a function of the seed, never of a state."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..diffusion.contracts import Batch
from ..diffusion.draws import fractions, key
from ..errors import RequestError
from .buckets import Bucketed
from .datasets import Dataset
from .negatives import Negatives
from .walk import permuted


@dataclass(frozen=True)
class Stream:
    """Batches of `global_batch` samples over all ranks and micro-batches.

    Every (update, repeat) walks through the data by itself, so that a critic and a student do not see the same samples.
    A finite dataset is walked epoch by epoch, each a new permutation; an endless one through consecutive indices.
    Of buckets every batch is of one, and each walks through its own samples. shape: of one sample, for data that are
    prompts only; buckets know theirs. caption_dropout: the share of samples that are shown without their captions,
    drawn anew for each visit. negatives: what they are drawn away from in place of the null, of the same sizes.
    prompts: whether batches hold their prompts as texts too, for what reads them.
    """

    dataset: Dataset | Bucketed
    global_batch: int
    seed: int
    shape: tuple[int, ...] | None = None
    caption_dropout: float = 0.0
    negatives: Negatives | None = None
    prompts: bool = False

    def batch(self, step: int, update: str, repeat: int = 0, rank: int = 0, world: int = 1, micro: int = 0,
              micros: int = 1) -> Batch:
        """Micro-batch `micro` of rank `rank`: a slice of the joined batch, which is the same however it is sliced.

        ids are positions in the walk: distinct within the joined batch, even where it holds a sample twice.
        """
        parts = world * micros
        if self.global_batch % parts:
            raise RequestError(f"data.batch is {self.global_batch}, which {world} processes x {micros} micro-batches "
                               "do not divide. "
                               f"Take a multiple of {parts}, or change train.accumulate.")
        size = self.global_batch // parts
        own, walk = (rank * micros + micro) * size + torch.arange(size), key(self.seed, "data", update, repeat)
        dataset, shape, number = self.dataset, self.shape, step
        if isinstance(dataset, Bucketed):
            dataset, shape, number = dataset.turn(step, self.global_batch, walk)
        ids, places, count = step * self.global_batch + own, number * self.global_batch + own, dataset.count
        indices = places + (walk >> 2) if count is None else permuted(places, count, walk)
        x0, cond = dataset[indices]
        if self.caption_dropout:
            cond = cond.dropped(fractions(key(walk, "caption dropout"), ids, 1)[:, 0] < self.caption_dropout)
        if self.negatives is not None:
            negative = self.negatives.of(ids, walk)
            cond = cond.replace(negative=negative.replace(time_ids=cond.null.time_ids))
        texts = dataset.prompts(indices) if self.prompts else None
        return Batch(ids, cond, x0, shape, dataset.pairs(indices), texts)
