"""What a bench leaves behind: results.json, curve.png, report.html and a table."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

from rich.markup import escape
from rich.table import Table

from ..errors import printable
from ..files import records
from ..files.whole import write_whole
from .page import made_of, page
from .protocol import demand_same

Row = dict[str, Any]
Results = dict[str, Any]               # {"protocol": {…}, "rows": [Row, …]}

METRICS = {"fd": "FD", "kid": "KID", "precision": "precision", "recall": "recall", "clip_score": "CLIP score",
           "diversity": "diversity", "all_attributes": "all attributes"}


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
            number(row["guidance"], "g"),
            f"{distance(m['fd'])} [{distance(m['fd_low'])}, {distance(m['fd_high'])}]", number(m["kid"], ".4f"),
            number(m["precision"], ".3f"),
            number(m["recall"], ".3f"), number(m["clip_score"], ".2f"), number(m["diversity"], ".3f"),
            number(m["all_attributes"], ".1%"), number(row["latency_ms"], ".1f"), number(row["images_per_s"], ".1f")]


def distance(value: float) -> str:
    """Three digits after the point, or four in all where it is large: a column stays narrow."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def in_words(row: Mapping[str, Any]) -> str:
    """A row of results.json in one line."""
    fd, latency = f"FD {cells(row)[4]}", row["latency_ms"]
    return f"{_label(row)}: {fd}" + ("" if latency is None else f", {latency:.4g} ms")


HEADINGS = ("target", "NFE", "steps", "w", "FD [95 %]", *list(METRICS.values())[1:], "ms", "images/s")


IN_BRIEF = ("target", "NFE", "w", "FD [95 %]", "all attributes", "ms")      # what fits into 80 columns


def table(results: Results) -> Table:
    """For a rich console: the columns that a curve is read by; results.json and report.html hold them all."""
    protocol = results["protocol"]
    made = Table(title=escape(printable(f"{protocol['samples']:,} samples against {protocol['reference']} in {protocol['features']}")),
                 title_justify="left", title_style="bold", header_style="bold", box=None)
    shown = [HEADINGS.index(heading) for heading in IN_BRIEF]
    for i in shown:
        made.add_column(HEADINGS[i].replace(" a", "\na"), justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    for row in results["rows"]:
        texts = [escape(printable(text)) for text in cells(row)]
        made.add_row(*(texts[i] for i in shown), style="green" if row["target"] == "real" else ""
                     if ":" in row["target"] else "bold")
    return made


NOTE = ("Every row is a call of a stock diffusers pipeline, from the same noise and the same prompts. A guided step takes two network evaluations. "
        "FD is extrapolated to infinitely many samples; its interval holds the truth in about 95 of 100 repetitions. Diversity is the mean distance "
        "in features between samples of one prompt: compare it with that of real pictures.")


def _page(results: Results, drawn: bytes, out: Path) -> str:
    rows = results["rows"]
    shown = [(row, out / "samples" / picture_name(row)) for row in rows]
    return page("Quality against network evaluations", NOTE, ("Fréchet distance against network evaluations", drawn), HEADINGS,
                [(_kind(row), cells(row)) for row in rows], [(_label(row), file.read_bytes()) for row, file in shown if file.is_file()],
                results["protocol"] | made_of(rows))


def _label(row: Row) -> str:
    return row["target"] if row["target"] == "real" else f"{row['target']}, {row['nfe']} NFE, w = {row['guidance']:g}"


def _kind(row: Row) -> str:
    return "real" if row["target"] == "real" else "teacher" if ":" in row["target"] else "student"
