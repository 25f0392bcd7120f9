"""Sources of data from outside: captions or captioned pictures by a name of their own, in place of a folder or a text
file."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .images import Images, Size
from .prompts import Captions

OWN = ("shapes", "none")                           # what a recipe means by these names, and no plugin
Open = Callable[[Size | None, int, int | None], Any]
SOURCES: dict[str, Open] = {}


def register_data(name: str, source: Open) -> None:
    """Makes a source of data known by its name, in this process: `data: {images: NAME}`, `data: {prompts: NAME}`.

    source(size, seed, count): size in pixels, of a side or height and width, None where captions alone are asked for;
    seed: the recipe's; count: its data.count, None for all. Of buckets it is called once for each size. What it
    returns has

        count                 how many samples there are, None where they never end
        identity              a dict that JSON can hold: all that the samples depend on, beside the code
        captions(indices)     indices (B,) int64 -> B texts, the same whenever they are asked for
        pixels(indices)       -> (B, 3, H, W) float32 in [-1, 1]; of captions alone it is not asked

    RequestError for a name of ours.
    """
    if name in OWN or not name.isidentifier():
        raise RequestError(f"a source of data is named by letters, digits and _, and not {' or '.join(OWN)}; "
                           f"found {name!r}")
    SOURCES[name] = source


@dataclass(frozen=True)
class Outside:
    """A source from outside. mark: changes with its code, so that caches of it do. open: the source again, its pictures
    of another size."""

    name: str
    mark: str | None
    source: Any
    open: Callable[[Size | None], Any]

    @property
    def count(self) -> int | None:
        return self.source.count

    @property
    def identity(self) -> dict[str, object]:
        return {"plugin": self.name, "code": self.mark, **self.source.identity}

    def captions(self, indices: Tensor) -> list[str]:
        found = list(self.source.captions(indices))
        if len(found) != len(indices) or not all(isinstance(text, str) for text in found):
            raise RequestError(f"the data {self.name} should give a text for each of {len(indices)} numbers; found "
                               f"{found!r:.200}")
        return found

    def pixels(self, indices: Tensor) -> Tensor:
        found = self.source.pixels(indices)
        if (found.dtype != torch.float32 or found.ndim != 4 or found.shape[:2] != (len(indices), 3)
            or found.abs().max() > 1):
            raise RequestError(f"the data {self.name} should give {len(indices)} pictures (B, 3, H, W) of float32 "
                               f"in [-1, 1]; found {tuple(found.shape)} of {found.dtype} in [{found.min():g}, "
                               f"{found.max():g}]")
        return found


def open_source(name: str, mark: str | None, size: Size | None, seed: int, count: int | None) -> Captions | Images:
    """A registered source by its name."""
    opened = lambda size: SOURCES[name](size, seed, count)
    return Outside(name, mark, opened(size), opened)
