"""Sheets of pictures: a grid with a label before each row."""
from __future__ import annotations

import io
from pathlib import Path
from typing import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..files.whole import write_whole
from ..models.stock import some_frames

GAP, LEAST_CELL = 4, 96


def sheet(images: Tensor | Sequence[Tensor], path: Path | str | None = None,
          captions: Sequence[str] | None = None) -> bytes:
    """Draws a grid and returns it as PNG; writes it to `path`, if given, aside first.

    images: rows of (columns, 3, H, W) in [-1, 1], all of one size, such as a teacher's row above its student's; or one
    (B, 3, H, W), laid out near to a square; or videos (B, F, 3, H, W), a row each, of at most 8 of their frames.
    captions: one label a row. Small pictures are enlarged by a whole factor.
    """
    rows = _rows(images)
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"{len(captions)} captions for {len(rows)} rows of pictures: one label a row")
    height, width = rows[0].shape[-2:]
    zoom = max(1, -(-LEAST_CELL // max(height, width)))
    font = ImageFont.load_default(size=15)
    margin = 0 if captions is None else round(max(font.getlength(text) for text in captions)) + 3 * GAP
    columns = max(len(row) for row in rows)
    cell_h, cell_w = height * zoom + GAP, width * zoom + GAP
    canvas = Image.new("RGB", (margin + columns * cell_w + GAP, len(rows) * cell_h + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        if captions is not None:
            draw.text((margin - 2 * GAP, GAP + i * cell_h + height * zoom / 2), captions[i], fill="#222222",
                      font=font, anchor="rm")
        for j, pixels in enumerate(row):
            canvas.paste(_picture(pixels, zoom), (margin + GAP + j * cell_w, GAP + i * cell_h))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    if path is not None:
        write_whole(Path(path), buffer.getvalue())
    return buffer.getvalue()


def _rows(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(images, Tensor):
        return list(images)
    if images.ndim == 5:
        return list(some_frames(images))
    return list(images.split(max(1, round(len(images) ** 0.5))))


def _picture(pixels: Tensor, zoom: int) -> Image.Image:
    levels = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).numpy())
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
