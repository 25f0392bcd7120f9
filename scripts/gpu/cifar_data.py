"""CIFAR-10's training pictures: read from one file, split, changed at random on the device, written as a folder of
classes."""
from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLASSES = 10
APART = 10                            # one picture in so many of each class is held out
THREADS = 16                          # PIL lets go of the interpreter's lock while it decodes


@dataclass(frozen=True)
class Pictures:
    """pixels (N, 3, H, W) uint8 and labels (N,) int64, on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> Pictures:
        return Pictures(self.pixels[rows], self.labels[rows])

    def to(self, device: torch.device) -> Pictures:
        return Pictures(self.pixels.to(device), self.labels.to(device))


def load(path: Path) -> Pictures:
    """From a .parquet file of `image.bytes` and `label`, which takes pyarrow, or an .npz of images (N, H, W, 3) uint8
    and labels (N,)."""
    if not path.is_file():
        raise SystemExit(f"the pictures of CIFAR-10 are missing: {path} is no file. Put its 50,000 training pictures "
                         "there, a .parquet with the columns image (bytes of a JPEG or PNG) and label, or an .npz "
                         "with images (N, 32, 32, 3) uint8 and labels (N,); or say where they are: --data PATH")
    if path.suffix == ".npz":
        with np.load(path) as found:
            images, labels = found["images"], found["labels"]
    else:
        images, labels = _parquet(path)
    return Pictures(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long())


def _parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise SystemExit(f"{path} is read by pyarrow, which is not installed: pip install pyarrow, or give an .npz "
                         "by --data") from None
    table = parquet.read_table(path, columns=["image", "label"])
    encoded = table["image"].combine_chunks().field("bytes").to_pylist()
    with ThreadPoolExecutor(THREADS) as threads:
        images = list(threads.map(_decoded, encoded, chunksize=500))
    return np.stack(images), table["label"].to_numpy()


def _decoded(encoded: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))


def split(pictures: Pictures) -> tuple[Pictures, Pictures]:
    """(to train on, held out): of each class every tenth picture is held out, in the order of the file."""
    by_class = torch.argsort(pictures.labels, stable=True)
    place = torch.arange(len(by_class))
    return pictures[by_class[place % APART != 0]], pictures[by_class[place % APART == 0]]


def scaled(pixels: Tensor) -> Tensor:
    """uint8 -> [-1, 1], float32."""
    return pixels.float() / 127.5 - 1


def levels(pixels: Tensor) -> Tensor:
    """[-1, 1] -> uint8, as a file holds it."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def augmented(pixels: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each picture flipped or not, and moved by up to `shift` pixels, what comes in mirrored: uint8 -> [-1, 1]."""
    count, _, height, width = pixels.shape
    drawn = {"generator": generator, "device": pixels.device}
    y, x = torch.randint(-shift, shift + 1, (2, count, 1), **drawn)
    rows, columns = (_mirrored(torch.arange(side, device=pixels.device) + by, side)
                     for side, by in ((height, y), (width, x)))
    columns = torch.where(torch.rand(count, 1, **drawn) < 0.5, columns, columns.flip(1))
    each = torch.arange(count, device=pixels.device)[:, None, None]
    return scaled(pixels[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2))


def _mirrored(place: Tensor, side: int) -> Tensor:
    return side - 1 - (side - 1 - place.abs()).abs()


def write_folder(pictures: Pictures, folder: Path) -> Path:
    """folder/<class>/<number>.png of every picture. Written aside, then renamed; one that is there stays."""
    if folder.is_dir():
        return folder
    aside = folder.with_suffix(".part")
    for label in range(CLASSES):
        (aside / str(label)).mkdir(parents=True, exist_ok=True)
    images = pictures.pixels.permute(0, 2, 3, 1).cpu().numpy()

    def write(rows: Sequence[int]) -> None:
        for i in rows:
            Image.fromarray(images[i]).save(aside / str(labels[i]) / f"{i:05d}.png", compress_level=1)

    labels = pictures.labels.tolist()
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(write, torch.arange(len(labels)).split(500)))
    return aside.replace(folder)
