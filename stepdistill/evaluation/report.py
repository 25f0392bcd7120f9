"""What a bench leaves behind: results.json, curve.png, report.html and a table."""
from __future__ import annotations

import csv
import io
import json
from math import exp
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from ..errors import printable, unmarked
from ..files import records
from ..files.whole import write_whole
from .estimate import Estimate
from .metrics import more_metrics
from .page import Drawing, Strip, made_of, page
from .protocol import demand_same

Row = dict[str, Any]
Results = dict[str, Any]               # {"protocol": {…}, "rows": [Row, …]}

METRICS = {"fd": "FD", "kid": "KID", "cmmd": "CMMD", "precision": "precision", "recall": "recall", "density": "density",
           "coverage": "coverage", "clip_score": "CLIP score", "diversity": "diversity",
           "all_attributes": "all attributes"}
DIGITS = {"kid": ".4f", "clip_score": ".2f", "all_attributes": ".1%"}          # of the others three


def read_results(file: Path) -> Results:
    """What a bench wrote. RequestError where the file is missing or damaged."""
    return records.read(file, records.Results, "Name a results.json that a bench wrote, or remove this one and "
                        "measure again")


def row_key(row: Mapping[str, Any]) -> tuple[str, int, float | None]:
    return row["target"], row["nfe"], row["guidance"]


def join(first: Results, second: Results, where: Path | str = "the second") -> Results:
    """The rows of both; of two that measure the same thing the second's. RequestError unless the protocols are
    equal."""
    demand_same(first["protocol"], second["protocol"], where)
    rows = {row_key(row): row for row in (*first["rows"], *second["rows"])}
    order = lambda row: (row["target"] != "real", ":" not in row["target"], row["target"], row["nfe"],
                         row["guidance"] or 0)
    return {"protocol": first["protocol"], "rows": sorted(rows.values(), key=order)}


def write_results(results: Results, out: Path) -> None:
    write_whole(out / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())


def write_report(results: Results, out: Path) -> None:
    """curve.png, report.html, table.csv and table.md beside results.json; the sample grid is made of the strips under
    out/samples."""
    from .curve import curve, front  # here, because matplotlib takes a quarter of a second

    rows = results["rows"]
    drawn, narrow = (curve(rows, results["protocol"]["dim"], narrow) for narrow in (False, True))
    write_whole(out / "curve.png", drawn)
    figures = [Drawing("Distance to real pictures against network evaluations", drawn, narrow)]
    if any(row["latency_ms"] is not None for row in rows):
        figures.append(Drawing("Distance to real pictures against the time of a picture", front(rows)))
    write_whole(out / "report.html", _page(results, figures, out).encode())
    write_whole(out / "table.csv", as_csv(rows).encode())
    write_whole(out / "table.md", as_markdown(rows).encode())


def as_csv(rows: Sequence[Row]) -> str:
    """All figures with their intervals, a line a row, under names as results.json has them."""
    plain = ("target", "method", "nfe", "steps", "guidance", "samples", "seed", "latency_ms", "images_per_s")
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow([*plain, *names])
    lines.writerows([[_cell(row[name]) for name in plain] + [row["metrics"].get(name) for name in names]
                     for row in rows])
    return written.getvalue()


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula begins with an apostrophe, by which it takes it for a text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def as_markdown(rows: Sequence[Row]) -> str:
    """The columns in brief, for a model card."""
    teacher, shown = at_its_ease(rows), [HEADINGS.index(heading) for heading in in_brief(rows)]
    line = lambda texts: "| " + " | ".join(texts) + " |"
    head = [line([HEADINGS[i] for i in shown]), "|" + "---|" * len(shown)]
    plain = lambda row: [unmarked(row["target"]), *cells(row, teacher)[1:]]
    return "\n".join(head + [line([plain(row)[i] for i in shown]) for row in rows]) + "\n"


def picture_name(row: Mapping[str, Any]) -> str:
    """The file under out/samples that shows a row."""
    return f"{row['target'].replace(':', '-').replace('/', '-')}-nfe{row['nfe']}-w{row['guidance'] or 0:g}.png"


def cells(row: Mapping[str, Any], teacher: Mapping[str, Any] | None = None, more: Sequence[str] = ()) -> list[str]:
    """A row of the table, as text, under HEADINGS and those of `more` metrics. teacher: the row that the distance is
    held against."""
    m = row["metrics"]
    number = lambda value, spec: "–" if value is None else format(value, spec)
    return [row["target"], number(row["nfe"] or None, "d"), number(row["steps"] or None, "d"),
            number(row["guidance"], "g"),
            _interval(None if teacher is None or row["target"] == "real" else ratio(row, teacher),
                      lambda value: f"{value:.2f}"), fd_of(m),
            *(number(m.get(name), DIGITS.get(name, ".3f")) for name in list(METRICS)[1:]),
            number(row["latency_ms"], ".1f"), number(row["images_per_s"], ".1f"),
            *(number(m[name], ".4g") for name in more)]


def fd_of(metrics: Mapping[str, float | None]) -> str:
    """With its interval; – where there were too few samples for one."""
    found = None if metrics["fd"] is None else Estimate(metrics["fd"], metrics["fd_low"], metrics["fd_high"])
    return _interval(found, distance)


def _interval(found: Estimate | None, spelled: Callable[[float], str]) -> str:
    return "–" if found is None else f"{spelled(found.value)} [{spelled(found.low)}, {spelled(found.high)}]"


def at_its_ease(rows: Sequence[Row]) -> Row | None:
    """The teacher's row of most evaluations, of several the one of least distance; None without a teacher or its
    distance."""
    teachers = [row for row in rows if ":" in row["target"] and row["metrics"]["fd"] is not None]
    return min(teachers, key=lambda row: (-row["nfe"], row["metrics"]["fd"]), default=None)


def ratio(row: Row, teacher: Row) -> Estimate | None:
    """FD over the teacher's FD. The interval adds the relative variances of both, on a logarithmic scale; None where a
    distance is not above 0, or is not known to be."""
    parts = [(one["metrics"]["fd"], one["metrics"]["fd_high"] - one["metrics"]["fd_low"]) for one in (row, teacher)
             if one["metrics"]["fd"] is not None]
    if len(parts) < 2 or min(value for value, _ in parts) <= 0:
        return None
    value, spread = parts[0][0] / parts[1][0], sum((width / 2 / value) ** 2 for value, width in parts) ** 0.5
    return Estimate(value, value * exp(-spread), value * exp(spread))


def distance(value: float) -> str:
    """Three digits after the point, or four in all where it is large: a column stays narrow."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def in_words(row: Mapping[str, Any]) -> str:
    """A row of results.json in one line."""
    m, latency = row["metrics"], row["latency_ms"]
    figure = (f"FD {fd_of(m)}" if m["fd"] is not None else f"KID {m['kid']:.4f} [{m['kid_low']:.4f}, "
              f"{m['kid_high']:.4f}]")
    return f"{_label(row)}: {figure}" + ("" if latency is None else f", {latency:.4g} ms")


HEADINGS = ("target", "NFE", "steps", "w", "× teacher", "FD [95 %]", *list(METRICS.values())[1:], "ms", "images/s")


def in_brief(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns that fit into 80 characters."""
    distance_name = "FD [95 %]" if any(row["metrics"]["fd"] is not None for row in rows) else "KID"
    return ("target", "NFE", "w", distance_name, "all attributes", "ms")


def table(results: Results) -> Table:
    """For a rich console: the columns that a curve is read by; results.json and report.html hold them all."""
    protocol = results["protocol"]
    made = Table(title=escape(printable(f"{protocol['samples']:,} samples against {protocol['reference']} in "
                                        f"{protocol['features']}")),
                 title_justify="left", title_style="bold", header_style="bold", box=None)
    more = more_metrics(protocol)
    headings = (*HEADINGS, *more)
    shown = [headings.index(heading) for heading in (*in_brief(results["rows"]), *more)]
    for i in shown:
        made.add_column(headings[i].replace(" a", "\na"), justify="right" if i else "left", no_wrap=bool(i),
                        overflow="fold")
    for row in results["rows"]:
        texts = [escape(printable(text)) for text in cells(row, more=more)]
        made.add_row(*(texts[i] for i in shown), style="green" if row["target"] == "real" else ""
                     if ":" in row["target"] else "bold")
    return made


NOTE = ("Every row is a call of a stock diffusers pipeline, from the same noise and the same prompts. A guided "
        "step takes two network evaluations. FD is extrapolated to infinitely many samples; its interval holds "
        "the truth in about 95 of 100 repetitions, and results.json has one for every figure. Diversity is the "
        "mean distance in features between samples of one prompt: compare it with that of real pictures.")


def _page(results: Results, figures: Sequence[Drawing], out: Path) -> str:
    rows = results["rows"]
    note = NOTE + "".join(f" Distances in {name} too: {_also(rows, name)}."
                          for name in results["protocol"].get("also", ()))
    more = more_metrics(results["protocol"])
    teacher, shown = at_its_ease(rows), [(row, out / "samples" / picture_name(row)) for row in rows]
    if teacher is not None:
        note += f" × teacher is FD over that of {_label(teacher)}."
    strips = [Strip(_label(row), row["nfe"], file.read_bytes()) for row, file in shown if file.is_file()]
    return page("Quality against network evaluations", note, figures, (*HEADINGS, *more),
                [(_kind(row), cells(row, teacher, more)) for row in rows], strips, results["protocol"] | made_of(rows))


def _also(rows: Sequence[Row], name: str) -> str:
    """The distances of rows in a further feature space, in the order of the table."""
    figures = [(row, row["also"][name]) for row in rows]
    return "; ".join(f"{_label(row)} {format(also['kid'], '.4f') if also['fd'] is None else fd_of(also)}"
                     for row, also in figures)


def _label(row: Row) -> str:
    return row["target"] if row["target"] == "real" else f"{row['target']}, {row['nfe']} NFE, w = {row['guidance']:g}"


def _kind(row: Row) -> str:
    return "real" if row["target"] == "real" else "teacher" if ":" in row["target"] else "student"
