"""Captioned pictures: Shapes, or a folder of images."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.draws import fractions, key
from ..diffusion.toy import Toy, is_toy
from ..errors import RequestError
from . import shapes
from .decoding import check_count, readable
from .folders import Reads, captions_of, digest_of, picture_files
from .picture import KINDS, Size, read_picture
from .prompts import Captions
from .shards import ShardImages
from .tables import TableImages, is_table


class Images(Captions, Protocol):
    """Numbered pictures with a caption each."""

    def pixels(self, indices: Tensor) -> Tensor:
        """indices: (B,) int64. Returns (B, 3, H, W) float32 in [-1, 1]."""


@dataclass(frozen=True)
class ShapesImages:
    """Pictures of scene (seed, i), a pure function of both; count None never ends."""

    size: Size = shapes.SIZE
    seed: int = 0
    count: int | None = None

    @property
    def identity(self) -> dict[str, object]:
        return {"images": "shapes", "seed": self.seed, "size": self.size}

    def captions(self, indices: Tensor) -> list[str]:
        return shapes.captions(shapes.scenes(indices, self.seed))

    def pixels(self, indices: Tensor) -> Tensor:
        return shapes.render(shapes.scenes(indices, self.seed), self.size)


@dataclass(frozen=True)
class FolderImages:
    """A folder of pictures. They are scaled to cover their size and cropped about the centre. sides: the height and
    width of each file.

    Captions stand in metadata.jsonl or metadata.csv (file_name, and text, caption or prompt), of the folder or of
    folders in it, or else in a .txt file beside each image. Of a network that is told classes they are, where neither
    is there, the names of the folders: of 3/a.png "class 3", of tench/a.png "tench".
    """

    size: Size
    files: tuple[Path, ...]
    texts: tuple[str, ...]
    sides: tuple[tuple[int, int], ...]
    name: str
    key: str

    @classmethod
    def open(cls, folder: Path, size: Size, count: int | None = None, reads: Reads = "texts") -> FolderImages:
        """Reads all captions, and decodes every image once, so that what is missing or damaged is found before
        training. Captions of images for a network that reads nothing are "". count: takes the first ones in the order
        of their paths."""
        if not folder.is_dir():
            raise RequestError(f"images: '{folder}' is not a folder. Give `shapes`, a folder of {KINDS} files, "
                               ".tar shards or .parquet files, or a dataset of the Hub.")
        files = picture_files(folder)
        if not files:
            raise RequestError(f"images: '{folder}' holds no image. Put {KINDS} files there, each with a caption.")
        captions = [""] * len(files) if reads == "nothing" else captions_of(folder, files, reads)
        check_count(count, len(files), folder)
        files, captions = files[:count], captions[:count]
        names = [path.relative_to(folder).as_posix() for path in files]
        kept = readable(digest_of(files, names), names, lambda i: read_picture(files[i]), str(folder))
        files, captions, names = ([of[i] for i in kept] for of in (files, captions, names))
        return cls(size, tuple(files), tuple(captions), tuple(kept.values()), folder.name,
                   digest_of(files, names, captions))

    @property
    def identity(self) -> dict[str, object]:
        return {"images": self.name, "files": self.count, "digest": self.key, "size": self.size}

    @property
    def count(self) -> int:
        return len(self.files)

    def captions(self, indices: Tensor) -> list[str]:
        return [self.texts[i] for i in indices.tolist()]

    def pixels(self, indices: Tensor) -> Tensor:
        return torch.stack([read_picture(self.files[i], self.size) for i in indices.tolist()])


@dataclass(frozen=True)
class Uncaptioned:
    """Pictures for a network that is asked for nothing, whatever their captions."""

    images: Images

    @property
    def count(self) -> int | None:
        return self.images.count

    @property
    def identity(self) -> dict[str, object]:
        return self.images.identity | {"captions": "none"}

    def captions(self, indices: Tensor) -> list[str]:
        return [""] * len(indices)

    def pixels(self, indices: Tensor) -> Tensor:
        return self.images.pixels(indices)


@dataclass(frozen=True)
class BothWays:
    """Pictures and their mirror images: sample 2 i is picture i, and 2 i + 1 its mirror image. Of endless ones sample i
    is picture i, every other one mirrored by chance."""

    images: Images

    @property
    def count(self) -> int | None:
        return None if self.images.count is None else 2 * self.images.count

    @property
    def identity(self) -> dict[str, object]:
        return self.images.identity | {"flip": True}

    def captions(self, indices: Tensor) -> list[str]:
        return self.images.captions(self._own(indices)[0])

    def pixels(self, indices: Tensor) -> Tensor:
        own, mirrored = self._own(indices)
        pixels = self.images.pixels(own)
        return torch.where(mirrored.reshape(-1, *[1] * (pixels.ndim - 1)), pixels.flip(-1), pixels)

    def _own(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures' numbers, and which of them are mirrored."""
        if self.images.count is None:
            return indices, fractions(key("flip"), indices, 1)[:, 0] < 0.5
        return indices // 2, indices % 2 == 1


def open_images(spec: str | Path, size: Size, seed: int = 0, count: int | None = None,
                reads: Reads = "texts") -> Images:
    """spec: "shapes"; a folder of pictures; WebDataset shards, a .tar file or a folder of some; a table, see
    `is_table`. seed is that of Shapes; count: how many, else the first ones. reads: what a network reads of
    captions."""
    if spec == "shapes":
        return Uncaptioned(ShapesImages(size, seed, count)) if reads == "nothing" else ShapesImages(size, seed, count)
    path = Path(spec)
    if is_toy(spec):
        return Toy(path, seed, count)
    if path.suffix == ".tar" and path.is_file() or path.is_dir() and any(path.rglob("*.tar")):
        return ShardImages.open(path, size, count, reads)
    return TableImages.open(spec, size, count, reads) if is_table(spec) else FolderImages.open(path, size, count, reads)
