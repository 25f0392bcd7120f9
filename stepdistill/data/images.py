"""Captioned pictures: Shapes, or a folder of images."""
from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterator, Literal, Protocol, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..diffusion.toy import Toy, is_toy
from ..errors import RequestError
from . import shapes
from .prompts import Captions

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")    # whatever a file is called: PIL hands some others to programs of the system
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)     # what PIL raises on damaged files


Size = int | tuple[int, int]      # pixels: of a side of a square, or height and width
Reads = Literal["texts", "classes", "nothing"]


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
    """A folder of png, jpg, webp or bmp files. They are resized on their shorter side and cropped about the centre.

    Captions stand in metadata.jsonl ({"file_name": ..., "text": ...} a line), or else in a .txt file beside each image. Of a network
    that is told classes they are, where neither is there, the names of the folders: of 3/a.png "class 3", of tench/a.png "tench".
    """

    folder: Path
    size: Size
    files: tuple[Path, ...]
    texts: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, size: Size, count: int | None = None, reads: Reads = "texts") -> FolderImages:
        """Reads all captions and every image's header, so that what is missing or damaged is found before training. Captions of images
        for a network that reads nothing are "". count: takes the first ones in the order of their paths."""
        if not folder.is_dir():
            raise RequestError(f"images: '{folder}' is not a folder. Give `shapes`, or a folder of png, jpg, webp or bmp "
                               "files.")
        files = picture_files(folder)
        if not files:
            raise RequestError(f"images: '{folder}' holds no image. Put png, jpg, webp or bmp files there, each with a "
                               "caption.")
        captions = [""] * len(files) if reads == "nothing" else captions_of(folder, files, reads)
        if count is not None and count > len(files):
            raise RequestError(f"images: '{folder}' holds {len(files)} images, fewer than data.count, which is {count}: leave it out for all "
                               "of them.")
        files, captions = files[:count], captions[:count]
        check_headers(files)
        return cls(folder, size, tuple(files), tuple(captions))

    @property
    def count(self) -> int:
        return len(self.files)

    @cached_property
    def identity(self) -> dict[str, object]:
        """Changes with any file's name, size, time of change or caption, and with the pixel size."""
        digest = hashlib.blake2b(digest_size=16)
        for path, text in zip(self.files, self.texts):
            stat = path.stat()
            digest.update(json.dumps([path.relative_to(self.folder).as_posix(), stat.st_size, stat.st_mtime_ns,
                                      text]).encode())
        return {"images": self.folder.name, "files": self.count, "digest": digest.hexdigest(), "size": self.size}

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


def open_images(spec: str | Path, size: Size, seed: int = 0, count: int | None = None, reads: Reads = "texts") -> Images:
    """spec: "shapes" or a folder. seed is that of Shapes; count: how many, of a folder the first ones. reads: what a network reads of captions."""
    if spec == "shapes":
        return Uncaptioned(ShapesImages(size, seed, count)) if reads == "nothing" else ShapesImages(size, seed, count)
    return Toy(Path(spec), seed, count) if is_toy(spec) else FolderImages.open(Path(spec), size, count, reads)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what PIL raises into a request error that names the file."""
    try:
        yield
    except UNREADABLE as error:
        raise RequestError(f"images: '{path}' cannot be read as an image ({error}). Replace or remove it.") from None


def picture_files(folder: Path) -> list[Path]:
    """Every picture under a folder, by name. What is hidden, such as a file browser's thumbnails, is none."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def check_headers(files: Sequence[Path]) -> None:
    """RequestError that names the first file that is no picture. Nothing is decoded."""
    for path in files:
        with _named(path), Image.open(path, formats=FORMATS):
            pass


def captions_of(folder: Path, files: list[Path], reads: Reads = "texts") -> list[str]:
    """One of each file, from metadata.jsonl where the folder has one, else from the .txt beside it; of "classes" also
    from the folder that it lies in. RequestError where one is missing."""
    table = folder / "metadata.jsonl"
    if table.is_file():
        return _from_table(table, files)
    return [_class_of(path, folder) if reads == "classes" else _beside(path) for path in files]


def read_picture(path: Path, size: Size | None = None) -> Tensor:
    """(3, H, W) float32 in [-1, 1], of its own size unless given. It is turned as its camera says; of 16 bits a channel
    the upper 8 count, rounded; what is transparent becomes white. RequestError where it cannot be read."""
    with _named(path), Image.open(path, formats=FORMATS) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode == "I" or image.mode.startswith("I;16"):
            image = Image.fromarray(np.rint(np.array(image).clip(0, 65_535) / 257).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of no known range; 8 or 16 bits a channel are read")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _class_of(path: Path, folder: Path) -> str:
    if path.with_suffix(".txt").is_file():
        return _beside(path)
    if path.parent == folder:
        raise RequestError(f"images: '{path}' has no class. Put it into a folder of '{folder}' that is named by its class, such as 3 or a label of "
                           f"the teacher's, or write that into '{path.with_suffix('.txt')}', as class 3.")
    return f"class {int(path.parent.name)}" if path.parent.name.isdecimal() else path.parent.name


def _beside(path: Path) -> str:
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        raise RequestError(f"images: '{path}' has no caption. Write it into '{caption}', or list all images in "
                           f"'metadata.jsonl' with {{\"file_name\": ..., \"text\": ...}} on each line.")
    return _text(_utf8(caption), path, caption.name)


def _from_table(table: Path, files: list[Path]) -> list[str]:
    """One caption for each of `files`, which metadata.jsonl must list one and all, and nothing else."""
    found: dict[Path, str] = {}
    for number, line in enumerate(_utf8(table).splitlines(), 1):
        if line.strip():
            path, text = _row(line, table, number)
            found[path] = _text(text, path, f"{table.name}, line {number}")
    missing = [path for path in files if path not in found]
    if missing:
        raise RequestError(f"images: '{missing[0]}' has no caption: '{table}' does not list it (images that it does "
                           "not list: "
                           f"{len(missing)}). Add a line for each, or move them elsewhere.")
    return [found[path] for path in files]


def _row(line: str, table: Path, number: int) -> tuple[Path, str]:
    try:
        row = json.loads(line)
        path, text = table.parent / row["file_name"], row["text"]
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"images: line {number} of '{table}' should read {{\"file_name\": ..., \"text\": ...}}; "
                           f"found {line[:80]}") from None
    if Path(row["file_name"]).is_absolute() or ".." in Path(row["file_name"]).parts or not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"images: line {number} of '{table}' names '{row['file_name']}', which is not a png, jpg, webp "
                           "or bmp "
                           "file of that folder.")
    return path, text


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise RequestError(f"images: '{path}' cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from None


def _text(text: object, path: Path, place: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"images: the caption of '{path}' is empty ({place}). Write what the image shows, or remove "
                           "the image.")
    return text.strip()
