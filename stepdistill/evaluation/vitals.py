"""The picture of a run's signals: a small panel each, with the band of what is healthy."""
from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, LINE, BAND, SICK = "#1f2933", "#1c7ed6", "#2f9e62", "#d9480f"
SHOWN = ("diversity/", "following/", "spread/", "offset/", "saturation/", "detail/", "unfit/", "lag/", "accuracy/",
         "angle/", "share/", "moved/", "grad_norm/",
         "clipped/", "skipped/")
COLUMNS = 4


def vitals(rows: Sequence[Mapping[str, float | str]], bands: Mapping[str, Sequence[float]],
           marks: Sequence[tuple[int, str]]) -> bytes:
    """PNG. rows: of signals.jsonl. marks: (step, what began there)."""
    names = [name for kind in SHOWN for name in dict.fromkeys(n for row in rows for n in row) if name.startswith(kind)]
    lines = max(1, -(-len(names) // COLUMNS))
    figure = Figure(figsize=(3.1 * COLUMNS, 2.0 * lines + 0.4), dpi=110)
    FigureCanvasAgg(figure)
    figure.subplots(lines, COLUMNS)
    for name, axis in zip(names, figure.axes):
        seen = [(row["step"], row[name]) for row in rows if name in row]
        if name in bands:
            axis.axhspan(*bands[name], color=BAND, alpha=0.15, lw=0)
        axis.plot(*zip(*seen), color=LINE, lw=1.4, marker=".", ms=3)
        for step, _ in marks:
            axis.axvline(step, color=SICK, lw=0.9, ls=(0, (4, 2)))
        values = [value for _, value in seen]
        reach = 0.15 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
        axis.set_ylim(min(values) - reach, max(values) + reach)
        axis.set_title(name, loc="left", fontsize=8.5, color=INK)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in figure.axes[len(names):]:
        axis.remove()
    if marks:
        figure.suptitle("; ".join(f"{what} since step {step:,}" for step, what in marks), fontsize=9, color=SICK)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
