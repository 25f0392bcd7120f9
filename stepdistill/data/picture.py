"""A file of a picture, read as people see it."""
from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import RequestError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# whatever a file is called: PIL hands some others to programs of the system
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
KINDS = "png, jpg, webp, bmp, tiff or gif"
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)     # what PIL raises on damaged files

Size = int | tuple[int, int]      # pixels: of a side of a square, or height and width


@contextmanager
def named(name: object) -> Iterator[None]:
    """Turns what PIL raises into a request error that names the picture."""
    try:
        yield
    except UNREADABLE as error:
        raise RequestError(f"images: '{name}' cannot be read as an image ({error}). Replace or remove it.") from None


def read_picture(file: Path | bytes, size: Size | None = None, name: object = None) -> Tensor:
    """(3, H, W) float32 in [-1, 1], of its own size unless given. It is turned as its camera says; of 16 bits a channel
    the upper 8 count, rounded; what is transparent becomes white; of a film the first picture is taken. file: a path,
    or what it holds. RequestError where it cannot be read, which calls it `name`, its path unless given."""
    with named(name or file), Image.open(io.BytesIO(file) if isinstance(file, bytes) else file,
                                         formats=FORMATS) as opened:
        return as_tensor(upright(opened), size)


def upright(opened: Image.Image) -> Image.Image:
    """As people see it: RGB, turned, on white."""
    image = ImageOps.exif_transpose(opened)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.array(image).clip(0, 65_535) / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range; 8 or 16 bits a channel are read")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_tensor(image: Image.Image, size: Size | None = None) -> Tensor:
    """(3, H, W) float32 in [-1, 1] of an RGB image, which is scaled to cover `size` and cropped about its centre."""
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
