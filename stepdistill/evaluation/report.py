"""What a bench leaves behind: results.json, curve.png, report.html and a table."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from ..errors import printable
from ..files import records
from ..files.whole import write_whole
from .page import made_of, page
from .protocol import demand_same

Row = dict[str, Any]
Results = dict[str, Any]               # {"protocol": {…}, "rows": [Row, …]}

METRICS = {"fd": "FD", "kid": "KID", "cmmd": "CMMD", "precision": "precision", "recall": "recall", "density": "density",
           "coverage": "coverage", "clip_score": "CLIP score", "diversity": "diversity", "all_attributes": "all attributes"}
DIGITS = {"kid": ".4f", "clip_score": ".2f", "all_attributes": ".1%"}          # of the others three


def read_results(file: Path) -> Results:
    """What a bench wrote. RequestError where the file is missing or damaged."""
    return records.read(file, records.Results, "Name a results.json that a bench wrote, or remove this one and measure again")


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
    """curve.png and report.html beside results.json; the sample grid is made of the strips under out/samples."""
    from .curve import curve  # here, because matplotlib takes a quarter of a second

    drawn = curve(results["rows"], results["protocol"]["dim"])
    write_whole(out / "curve.png", drawn)
    write_whole(out / "report.html", _page(results, drawn, out).encode())


def picture_name(row: Mapping[str, Any]) -> str:
    """The file under out/samples that shows a row."""
    return f"{row['target'].replace(':', '-').replace('/', '-')}-nfe{row['nfe']}-w{row['guidance'] or 0:g}.png"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table, as text: target, NFE, steps, guidance, the metrics, latency, images per second."""
    m = row["metrics"]
    number = lambda value, spec: "–" if value is None else format(value, spec)
    return [row["target"], number(row["nfe"] or None, "d"), number(row["steps"] or None, "d"),
            number(row["guidance"], "g"), fd_of(m), *(number(m.get(name), DIGITS.get(name, ".3f")) for name in list(METRICS)[1:]),
            number(row["latency_ms"], ".1f"), number(row["images_per_s"], ".1f")]


def fd_of(metrics: Mapping[str, float | None]) -> str:
    """With its interval; – where there were too few samples for one."""
    if metrics["fd"] is None:
        return "–"
    return f"{distance(metrics['fd'])} [{distance(metrics['fd_low'])}, {distance(metrics['fd_high'])}]"


def distance(value: float) -> str:
    """Three digits after the point, or four in all where it is large: a column stays narrow."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def in_words(row: Mapping[str, Any]) -> str:
    """A row of results.json in one line."""
    m, latency = row["metrics"], row["latency_ms"]
    figure = f"FD {fd_of(m)}" if m["fd"] is not None else f"KID {m['kid']:.4f} [{m['kid_low']:.4f}, {m['kid_high']:.4f}]"
    return f"{_label(row)}: {figure}" + ("" if latency is None else f", {latency:.4g} ms")


HEADINGS = ("target", "NFE", "steps", "w", "FD [95 %]", *list(METRICS.values())[1:], "ms", "images/s")


def in_brief(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns that fit into 80 characters."""
    distance_name = "FD [95 %]" if any(row["metrics"]["fd"] is not None for row in rows) else "KID"
    return ("target", "NFE", "w", distance_name, "all attributes", "ms")


def table(results: Results) -> Table:
    """For a rich console: the columns that a curve is read by; results.json and report.html hold them all."""
    protocol = results["protocol"]
    made = Table(title=f"{protocol['samples']:,} samples against {protocol['reference']} in {protocol['features']}",
                 title_justify="left", title_style="bold", header_style="bold", box=None)
    shown = [HEADINGS.index(heading) for heading in in_brief(results["rows"])]
    for i in shown:
        made.add_column(HEADINGS[i].replace(" a", "\na"), justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    for row in results["rows"]:
        texts = [escape(printable(text)) for text in cells(row)]
        made.add_row(*(texts[i] for i in shown), style="green" if row["target"] == "real" else ""
                     if ":" in row["target"] else "bold")
    return made


NOTE = ("Every row is a call of a stock diffusers pipeline, from the same noise and the same prompts. A guided step takes two network evaluations. "
        "FD is extrapolated to infinitely many samples; its interval holds the truth in about 95 of 100 repetitions, and results.json has one for "
        "every figure. Diversity is the mean distance in features between samples of one prompt: compare it with that of real pictures.")


def _page(results: Results, drawn: bytes, out: Path) -> str:
    rows = results["rows"]
    shown = [(row, out / "samples" / picture_name(row)) for row in rows]
    note = NOTE + "".join(f" Distances in {name} too: {_also(rows, name)}." for name in results["protocol"].get("also", ()))
    return page("Quality against network evaluations", note, ("Distance to real pictures against network evaluations", drawn), HEADINGS,
                [(_kind(row), cells(row)) for row in rows], [(_label(row), file.read_bytes()) for row, file in shown if file.is_file()],
                results["protocol"] | made_of(rows))


def _also(rows: Sequence[Row], name: str) -> str:
    """The distances of rows in a further feature space, in the order of the table."""
    return "; ".join(f"{_label(row)} {fd_of(row['also'][name]) if row['also'][name]['fd'] is not None else format(row['also'][name]['kid'], '.4f')}"
                     for row in rows)


def _label(row: Row) -> str:
    return row["target"] if row["target"] == "real" else f"{row['target']}, {row['nfe']} NFE, w = {row['guidance']:g}"


def _kind(row: Row) -> str:
    return "real" if row["target"] == "real" else "teacher" if ":" in row["target"] else "student"
