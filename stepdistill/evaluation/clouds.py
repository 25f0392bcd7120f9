"""Clouds of points in the plane: how they look, and how far two of them are apart."""
from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files.whole import write_whole

COLOURS = ("#d9480f", "#1c7ed6", "#2f9e62", "#9c36b5")
INK, REACH, CHUNK = "#1f2933", 3.2, 2000


def energy_distance(x: Tensor, y: Tensor, within_y: float | None = None) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over independent pairs, without bias: 0 in the mean where the laws are equal.

    x (n, D), y (m, D); within_y: E|y - y'|, where it is known. Székely & Rizzo 2013, "Energy statistics", eq. 1.1.
    """
    return 2 * _mean(x, y) - within(x) - (within(y) if within_y is None else within_y)


def within(z: Tensor) -> float:
    """E|z - z'| of two different points of z (n, D)."""
    return _mean(z, z) * len(z) / (len(z) - 1)


def _mean(x: Tensor, y: Tensor) -> float:
    x, y = x.float(), y.float()
    sums = [torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist").sum(dtype=torch.float64)
            for part in x.split(CHUNK)]
    return (torch.stack(sums).sum() / len(x) / len(y)).item()


def cloud(panels: Mapping[str, tuple[Tensor, Tensor]], path: Path | str, ways: Mapping[str, Tensor] | None = None,
          columns: int | None = None) -> None:
    """Scatter plots side by side: title -> points (n, 2) and their classes (n,). Written aside first.

    ways: title -> (n, steps + 1, 2), trajectories that are drawn over the points of that panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, because it takes a quarter of a second
    from matplotlib.figure import Figure

    columns = min(columns or len(panels), len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.9 * columns, 3.1 * rows), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    # in this order, or zip takes one axis too many
    for (title, (points, classes)), axis in zip(panels.items(), axes):
        colours = [COLOURS[label % len(COLOURS)] for label in classes.tolist()]
        axis.scatter(*points.T, s=2, c=colours, alpha=0.35, linewidths=0)
        for way in () if ways is None else ways.get(title, ()):
            axis.plot(*way.T, color=INK, lw=0.6, alpha=0.7, marker=".", ms=2)
        axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=(), yticks=())
        axis.set_title(title, fontsize=9, color=INK)
    for axis in list(axes):
        axis.remove()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(Path(path), buffer.getvalue())


def points_of(latents: Tensor) -> Tensor:
    """(B, 2, 1, 1), as Toy's samples are, as (B, 2)."""
    return latents.detach().cpu().flatten(1)
