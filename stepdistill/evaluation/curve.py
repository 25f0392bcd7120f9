"""The picture of a bench: distance and attributes against network evaluations."""
from __future__ import annotations

import io
from itertools import cycle
from typing import Any, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..errors import printable
from .estimate import share_of

Row = Mapping[str, Any]

INK, FAINT, REAL = "#1f2933", "#9aa5b1", "#2f9e62"
STUDENTS = ("#d9480f", "#1c7ed6", "#9c36b5", "#e0a100", "#0b7285", "#c2255c")
DASHES = {"ddim": (0, ()), "euler": (0, (5, 2)), "heun": (0, (1, 1.4)), "dpmpp_2m": (0, (6, 2, 1, 2))}


def curve(rows: Sequence[Row], dim: int, narrow: bool = False) -> bytes:
    """PNG. Left: FD with its 95 % interval, both axes logarithmic. Right, where attributes were classified: the share
    of pictures with all of them right; narrow: below, for a phone."""
    count = 1 + any(row["metrics"]["all_attributes"] is not None for row in rows)
    columns, down = (1, count) if narrow else (count, 1)
    size = (5.0, 4.0) if narrow else (5.75 if count == 2 else 6.4, 4.9)
    figure = Figure(figsize=(size[0] * columns, size[1] * down), dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, columns, squeeze=False).flat
    _distance_panel(panels[0], rows, dim)
    if count == 2:
        _attribute_panel(panels[1], rows)
    handles, labels = panels[0].get_legend_handles_labels()
    beside = 2 if narrow else 3 * columns
    lines = -(-len(labels) // beside)
    figure.tight_layout(rect=(0, (0.1 + 0.27 * lines) / (size[1] * down), 1, 1), w_pad=3)
    figure.legend(handles, labels, loc="lower center", ncols=beside, frameon=False, fontsize=8.5, columnspacing=1.4,
                  handlelength=2.4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _written(name: str) -> str:
    """A name as it is: between two $ matplotlib reads formulas."""
    return printable(name).replace("$", r"\$")


def front(rows: Sequence[Row]) -> bytes:
    """PNG. Distance against the milliseconds of one picture, at batch 1; the rows that none beats in both are
    joined."""
    name = figure_of(rows)
    timed = [row for row in rows if row["latency_ms"] is not None]
    figure = Figure(figsize=(6.4, 4.6), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    at = lambda row: (row["latency_ms"], row["metrics"][name])
    ahead = sorted((row for row in timed if not any(at(other) != at(row) and other["latency_ms"] <= row["latency_ms"]
                                                    and other["metrics"][name] <= row["metrics"][name]
                                                    for other in timed)), key=at)
    axes.plot(*zip(*map(at, ahead), strict=True), color=FAINT, lw=1.4, zorder=1, label="none is better in both")
    name_of = lambda row: row["target"].replace(f":{solver_of(row)}", ", all solvers")
    targets = list(dict.fromkeys(map(name_of, timed)))
    colours = dict(zip(dict.fromkeys(row["target"] for row in timed if not solver_of(row)), cycle(STUDENTS)))
    for target in targets:
        own = [row for row in timed if name_of(row) == target]
        axes.scatter(*zip(*map(at, own), strict=True), s=34, color=colours.get(target, INK), marker="D"
                     if target in colours else "o",
                     zorder=3, label=_written(target))
        for row in own:
            axes.annotate(f"{row['nfe']}", at(row), xytext=(5, 4), textcoords="offset points", fontsize=8, color=INK)
    axes.set_xscale("log")
    _distance_axis(axes, [(row["metrics"][name],) * 3 for row in timed])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("milliseconds of a picture (numbers: network evaluations)")
    axes.set_ylabel("Fréchet distance" if name == "fd" else "Kernel Inception distance")
    axes.grid(True, which="major", color="#e4e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def solver_of(row: Row) -> str | None:
    """dpmpp_2m of teacher:dpmpp_2m; None for a student and for real pictures."""
    return row["target"].partition(":")[2] or None


def figure_of(rows: Sequence[Row]) -> str:
    """What the rows are compared by: the Fréchet distance where each has one, else KID."""
    return "fd" if all(row["metrics"]["fd"] is not None for row in rows) else "kid"


def best_per_nfe(rows: Sequence[Row]) -> list[Row]:
    """Among rows of equal evaluations the one of least distance, in the order of evaluations."""
    best: dict[int, Row] = {}
    by = figure_of(rows)
    for row in rows:
        if row["nfe"] not in best or row["metrics"][by] < best[row["nfe"]]["metrics"][by]:
            best[row["nfe"]] = row
    return [best[nfe] for nfe in sorted(best)]


def lines(rows: Sequence[Row]) -> tuple[dict[str, list[Row]], list[Row], dict[str, list[Row]]]:
    """(teacher solvers, the best of them all, students): rows to be joined by a line, each over increasing
    evaluations."""
    teachers = [row for row in rows if solver_of(row)]
    students = [row for row in rows if not solver_of(row) and row["target"] != "real"]
    by_name = lambda some: {name: best_per_nfe([r for r in some if r["target"] == name])
                            for name in dict.fromkeys(r["target"] for r in some)}
    return by_name(teachers), best_per_nfe(teachers), by_name(students)


def _distance_panel(axes: Axes, rows: Sequence[Row], dim: int) -> None:
    solvers, best, students = lines(rows)
    name = figure_of(rows)
    metric = lambda row: tuple(row["metrics"][key] for key in (name, f"{name}_low", f"{name}_high"))
    _draw(axes, solvers, best, students, metric)
    for real in (row for row in rows if row["target"] == "real"):
        axes.axhspan(*metric(real)[1:], color=REAL, alpha=0.18, lw=0,
                     label=f"fresh real pictures: {metric(real)[0]:.3f}")
    _distance_axis(axes, [metric(row) for row in rows if row["target"] != "real"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_ylabel(f"{'Fréchet' if name == 'fd' else 'Kernel Inception'} distance, {dim} features")
    axes.set_title("Distance to real pictures", loc="left", fontsize=11, color=INK, fontweight="bold")


def _distance_axis(axes: Axes, figures: Sequence[tuple[float, ...]]) -> None:
    """Logarithmic; where an estimate or the end of its interval is 0 or less, linear below the least distance that is
    not."""
    shown = [number for figure in figures for number in figure]
    least = min([value for value, _, _ in figures if value > 0], default=1.0)
    if shown and min(shown) <= 0:
        axes.set_yscale("symlog", linthresh=least, subs=(2, 5))
        axes.set_ylim(bottom=min(shown) - least / 4)
        axes.axhline(0, color=INK, lw=0.8)
    else:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(shown, default=least) / 2)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())


def _attribute_panel(axes: Axes, rows: Sequence[Row]) -> None:
    measured = [row for row in rows if row["metrics"]["all_attributes"] is not None]
    solvers, best, students = lines(measured)
    share = lambda row: share_of(row["metrics"]["all_attributes"], row["samples"])
    metric = lambda row: tuple(100 * edge for edge in (share(row).value, share(row).low, share(row).high))
    _draw(axes, solvers, best, students, metric)
    for real in (row for row in measured if row["target"] == "real"):
        _, low, high = metric(real)
        axes.axhspan(low, max(high, low + 0.8), color=REAL, alpha=0.3, lw=0)
    axes.set_ylim(0, 103)
    axes.set_ylabel("pictures with all attributes right, %")
    real = "".join(f" (real: {metric(row)[0]:.1f} %)" for row in measured if row["target"] == "real")
    axes.set_title(f"Doing what the prompt says{real}", loc="left", fontsize=11, color=INK, fontweight="bold")


def _draw(axes: Axes, solvers: Mapping[str, list[Row]], best: list[Row], students: Mapping[str, list[Row]],
          metric) -> None:
    """Teacher solvers thin, the best of them at each count of evaluations bold, students bold in colour."""
    for colour, (name, line) in zip(cycle(STUDENTS), students.items()):
        _errors(axes, line, metric, color=colour, marker="D", ms=5.5, lw=2.6, label=_written(name), zorder=5)
    if best:
        teacher = best[0]["target"].partition(":")[0]
        _errors(axes, best, metric, color=INK, marker="o", ms=5, lw=2, label=_written(f"{teacher}, best solver"),
                zorder=4)
    for name, line in solvers.items():
        axes.plot(*_xy(line, metric), color=FAINT, lw=1.2, ls=DASHES.get(name.partition(":")[2], "-"), marker=".",
                  ms=4, label=_written(name))
    axes.set_xscale("log")
    ticks = sorted({row["nfe"] for line in (*solvers.values(), *students.values()) for row in line})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.set_xlabel("network evaluations per picture (a guided step takes two)")
    axes.grid(True, which="major", color="#e4e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _xy(line: list[Row], metric) -> tuple[list[int], list[float]]:
    return [row["nfe"] for row in line], [metric(row)[0] for row in line]


def _errors(axes: Axes, line: list[Row], metric, **style: Any) -> None:
    x, y = _xy(line, metric)
    spread = [[value - low for value, low, _ in map(metric, line)],
              [high - value for value, _, high in map(metric, line)]]
    axes.errorbar(x, y, yerr=spread, capsize=3, elinewidth=1.2, **style)
