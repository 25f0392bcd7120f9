"""Buckets of aspect: pictures of like shape are cut to one size, and every batch is of one size.

Which bucket a batch is of follows from the seed and the moment (step, update, repeat) alone, so that all ranks and
micro-batches take theirs from one joined batch, and a resumed run goes on as it began.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, sqrt

import torch
from torch import Tensor

from ..diffusion.draws import fractions, key
from .datasets import Samples
from .images import Images
from .notices import say_once
from .walk import permuted

Sides = tuple[int, int]                           # height and width in pixels
# of a square's side, steps between the sides of buckets; long side to short
STEPS, LONGEST = 16, 2.0


def standard(own: Sides, multiple: int) -> tuple[Sides, ...]:
    """Buckets of about the area of `own`, which comes first and is the largest: their sides are multiples of a
    sixteenth of a square's side of that area, itself a multiple of `multiple`, and the long one is at most twice the
    short one. Of 1024 x 1024 these are SDXL's own (arXiv:2307.01952, appendix I) from 768 x 1344 to 1344 x 768 whose
    sides are as long as they can be."""
    area = own[0] * own[1]
    step = max(multiple, round(sqrt(area) / STEPS / multiple) * multiple)
    found = [(short, area // short // step * step) for short in range(step, isqrt(area) + 1, step)]
    found = [(short, long) for short, long in found if short <= long <= LONGEST * short]
    return tuple(dict.fromkeys([own, *(pair for short, long in found for pair in ((short, long), (long, short)))]))


def nearest(pictures: Sequence[Sides], sizes: Sequence[Sides]) -> Tensor:
    """The bucket of each picture, that of the nearest aspect in logarithms, of two alike the first: (N,) int64."""
    aspect = lambda sides: torch.tensor(sides, dtype=torch.float64).log().diff()
    return (aspect(pictures) - aspect(sizes).T).abs().argmin(1)


def filled(pictures: Sequence[Sides], sizes: Sequence[Sides], least: int) -> list[tuple[Sides, Tensor]]:
    """The buckets that hold pictures, each with the numbers of its own, (n,) int64 ascending. One of fewer than `least`
    is given up, the smallest first, and its pictures go to those that are next; the last one stays. What was given up
    is said."""
    left, given_up = list(sizes), []
    while True:
        bucket = nearest(pictures, left)
        counts = torch.bincount(bucket, minlength=len(left))
        smallest = int(counts.argmin())
        if counts[smallest] >= least or len(left) == 1:
            break
        if counts[smallest]:
            given_up.append(f"{left[smallest][0]} x {left[smallest][1]} with {counts[smallest]}")
        del left[smallest]
    if given_up:
        say_once(f"images: buckets of fewer pictures than a batch of {least} are merged into their nearest: "
                 f"{', '.join(given_up)}")
    return [(size, (bucket == i).nonzero()[:, 0]) for i, size in enumerate(left)]


def told(pictures: Sequence[Sides], size: Sides) -> Tensor:
    """What SDXL is told of pictures (arXiv:2307.01952, section 2.2) that are scaled to cover `size` and cropped about
    their centre: (N, 6) float64, their own height and width, the crop's top and left edges in the scaled picture, and
    `size`."""
    own, cut = torch.tensor(pictures, dtype=torch.float64), torch.tensor(size, dtype=torch.float64)
    scale = (cut / own).amax(1, keepdim=True)
    return torch.cat([own, ((own * scale - cut) / 2).round(), cut.expand(len(own), 2)], 1)


def farthest(sizes: Sequence[Sides]) -> Sides:
    """The bucket whose aspect is farthest from the first one's."""
    ratio = lambda sides: torch.tensor(sides[0] / sides[1]).log()
    return max(sizes, key=lambda sides: abs(ratio(sides) - ratio(sizes[0])))


@dataclass(frozen=True)
class Chosen:
    """Some of the pictures. numbers: (n,) int64, theirs."""

    images: Images
    numbers: Tensor

    @property
    def count(self) -> int:
        return len(self.numbers)

    @property
    def identity(self) -> dict[str, object]:
        return self.images.identity | {"chosen": hashlib.blake2b(self.numbers.numpy().tobytes(),
                                                                 digest_size=16).hexdigest()}

    def captions(self, indices: Tensor) -> list[str]:
        return self.images.captions(self.numbers[indices])

    def pixels(self, indices: Tensor) -> Tensor:
        return self.images.pixels(self.numbers[indices])


@dataclass(frozen=True)
class Bucketed:
    """Samples by bucket. shapes: of one sample of each. own: whether each bucket has samples of its own; otherwise all
    have the same ones, a picture or a prompt being of any size, and a batch's size is drawn, each as often."""

    parts: tuple[Samples, ...]
    shapes: tuple[tuple[int, ...], ...]
    own: bool

    def turn(self, step: int, batch: int, walk: int) -> tuple[Samples, tuple[int, ...], int]:
        """(the samples that batch `step` of a walk is of, the shape of one, which batch of these it is)."""
        part, number = self._own_turn(step, batch, walk) if self.own else (self._drawn(step, walk), step)
        return self.parts[part], self.shapes[part], number

    def _drawn(self, step: int, walk: int) -> int:
        return int(fractions(key(walk, "bucket"), torch.tensor([step]), 1) * len(self.parts))

    def _own_turn(self, step: int, batch: int, walk: int) -> tuple[int, int]:
        """Epoch after epoch each bucket has its batches, in an order that is shuffled anew. By the end of epoch e a
        bucket of n samples has had ceil(e n / batch) batches in all, so that every sample is seen as often."""
        counts = [part.count for part in self.parts]
        until = lambda epoch: [-(-epoch * count // batch) for count in counts]
        epoch = step * batch // sum(counts)                   # at most: rounding up only adds batches
        while sum(until(epoch)) > step:
            epoch -= 1
        before, after = until(epoch), until(epoch + 1)
        place = step - sum(before)
        slot = int(permuted(torch.tensor([place]), sum(after) - sum(before), key(walk, "buckets", epoch)))
        for part, (low, high) in enumerate(zip(before, after, strict=True)):
            if slot < high - low:
                return part, low + slot
            slot -= high - low
        raise AssertionError("a slot beyond the last bucket")
