"""report.html: one file that can be sent to others, for light and dark, wide and narrow, with tables that sort."""
from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.whole import write_whole
from .metrics import more_metrics
from .motion import FIGURES

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --faint: #52606d; --ground: #fff; --line: #d3dae2; --real: #1a7343 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --faint: #aab4bf; --ground: #14181d; --line: #39424d; --real: #63d196 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  margin: 2rem auto; padding: 0 1rem; max-width: 90rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.note { color: var(--faint); max-width: 70ch } img { max-width: 100%; height: auto } img.figure { background: #fff }
img.strip { image-rendering: pixelated; height: 68px; max-width: none; display: block }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap }
:focus-visible { outline: 3px solid var(--real); outline-offset: 2px }
div.wide { overflow-x: auto; position: relative }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid var(--faint) }
th button { font: inherit; font-weight: 700; color: inherit; background: none; border: 0; padding: 0; cursor: pointer }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
tr.real td { color: var(--real) } tr.student td { font-weight: 600 }
label.slide { display: flex; gap: .8rem; align-items: center; flex-wrap: wrap; margin-bottom: .8rem }
label.slide input { flex: 0 1 20rem; min-width: 12rem } tr[hidden] { display: none }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem }
dt { color: var(--faint) } dd { margin: 0; overflow-wrap: anywhere }
"""
SORT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], i = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending", value = row => row.cells[i].textContent;
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const order = (a, b) => { const x = parseFloat(value(a)), y = parseFloat(value(b));
    return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) || value(a).localeCompare(value(b)) : x - y };
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
};
"""
SLIDE = """
for (const slider of document.querySelectorAll("input[type=range]")) slider.oninput = () => {
  const counts = slider.dataset.counts.split(","), count = counts[slider.value - 1];
  slider.nextElementSibling.textContent = count ? `${count} network evaluations` : "all";
  slider.setAttribute("aria-valuetext", slider.nextElementSibling.textContent);
  for (const row of document.querySelectorAll("tr[data-nfe]"))
    row.hidden = Boolean(count) && row.dataset.nfe !== "0" && row.dataset.nfe !== count;
};
"""


@dataclass(frozen=True)
class Strip:
    """Pictures of a row of the table, PNG. nfe: its network evaluations; 0 of real pictures."""

    label: str
    nfe: int
    png: bytes


@dataclass(frozen=True)
class Drawing:
    """A figure, PNG. narrow: the same for a window of a phone's width, where it is another."""

    what: str
    png: bytes
    narrow: bytes | None = None

    @property
    def element(self) -> str:
        shown = f'<img class="figure" alt="{html.escape(self.what)}" src="{embedded(self.png)}">'
        if self.narrow is None:
            return shown
        return f'<picture><source media="(max-width: 40rem)" srcset="{embedded(self.narrow)}">{shown}</picture>'


def page(title: str, note: str, figures: Sequence[Drawing], headings: Sequence[str],
         rows: Sequence[tuple[str, Sequence[str]]],
         strips: Sequence[Strip], facts: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """rows: (kind, cells), of the kinds real, teacher and student. strips: from
    the same noise; a slider shows those of one count of evaluations. facts: what the figures depend on. words: what was
    found, in sentences."""
    body = "".join(f"<tr class='{kind}'>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
                   for kind, cells in rows)
    heads = "".join(f"<th scope='col'><button type='button'>{html.escape(heading)}</button></th>"
                    for heading in headings)
    shown = "".join(f"<tr data-nfe='{strip.nfe}'><th scope='row'>{html.escape(strip.label)}</th><td><img class='strip' "
                    f"alt='Samples of {html.escape(strip.label)}' src='{embedded(strip.png)}'></td></tr>"
                    for strip in strips)
    drawn = "".join(figure.element for figure in figures)
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
    found = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in words)
    wide = (lambda name, said, inner: "<div class='wide' role='region' tabindex='0' "
            f"aria-label='{name}'><table><caption>{said}</caption>{inner}</table></div>")
    figures_table = wide("Figures", "A row for each target; the buttons in its head sort it",
                         f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>")
    pictures = wide("Samples", "Pictures of each row", f"<tbody>{shown}</tbody>")
    samples_table = f"<h2>Samples</h2>{_slider(strips)}{pictures}" if shown else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>
<h1>{html.escape(title)}</h1>
<p class="note">{html.escape(note)}</p>
{f"<ul>{found}</ul>" if found else ""}
{drawn}
<h2>Figures</h2>{figures_table}
{samples_table}
<h2>How they were made</h2><dl>{listed}</dl>
</main><script>{SORT}{SLIDE}</script></body></html>
"""


def _slider(strips: Sequence[Strip]) -> str:
    counts = sorted({strip.nfe for strip in strips if strip.nfe})
    if len(counts) < 2:
        return ""
    return (f"<label class='slide'>From the same noise at <input type='range' min='0' max='{len(counts)}' value='0' "
            f"aria-valuetext='all' data-counts='{','.join(map(str, counts))}'><output>all</output></label>")


def embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


OWN = ("target", "NFE", "steps", "w", "to teacher", "CLIP score", "diversity")


def _own_rows(results: Mapping[str, Any], more: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The rows of a table under OWN, the time of a picture, and those of `more` metrics."""
    number = lambda value, digits: "–" if value is None else f"{value:.{digits}f}"
    return [("teacher" if ":" in row["target"] else "student",
             [row["target"], str(row["nfe"]), str(row["steps"]), f"{row['guidance']:g}",
              number(row["metrics"]["to_teacher"], 4),
              number(row["metrics"]["clip_score"], 2), number(row["metrics"]["diversity"], 4),
              number(row["latency_ms"], 1),
              *(number(row["metrics"].get(name), 4) for name in more)]) for row in results["rows"]]


def write_own_report(results: Mapping[str, Any], together: bytes, out: Path) -> None:
    """report.html of a bench against the teacher's own pictures. together: PNG, a row of pictures for each of
    results.json."""
    videos = [name for name in FIGURES if name in results["rows"][0]["metrics"]]
    more = [*videos, *more_metrics(results["protocol"])]
    note = ("Every row is a call of a stock diffusers pipeline, from the same noise and the same prompts; a guided "
            "step takes two network evaluations. The distance to the teacher is the root mean square over pixels "
            "in [0, 1] to the teacher's own pictures, the first row. Students that are taught the teacher's law "
            "rather than its way from noise to picture may lie far from them and be good.")
    write_whole(out / "report.html", page(
        "Teacher and student from the same noise", note,
        [Drawing("Pictures of each row, from the same noise", together)],
        (*OWN, "ms", *(FIGURES.get(name, name) for name in more)), _own_rows(results, more), [],
        results["protocol"] | made_of(results["rows"]),
        results.get("words", ())).encode())


def write_composed_report(results: Mapping[str, Any], grids: Sequence[Drawing], out: Path) -> None:
    """report.html of a bench under other LoRAs."""
    more, composed = more_metrics(results["protocol"]), results["compose"]
    note = ("Every row is a call of a stock diffusers pipeline, from the same noise and the same prompts. The distance "
            "to the teacher is the root mean square over pixels in [0, 1] to the teacher's picture under the same "
            "LoRA at the same scale. Kept is the share of the LoRA's mean effect on the teacher, in the features "
            "named below, that is seen on the student.")
    kept = [f"kept {_interval(scale, 'kept')} at scale {scale['scale']:g}" for one in composed
            for scale in one["scales"]]
    facts = results["protocol"] | made_of(results["rows"]) | ({"kept, with 95 % intervals": "; ".join(kept)}
                                                              if kept else {})
    write_whole(out / "report.html", page(
        "A student under other LoRAs", note, grids, (*OWN, "ms", *more), _own_rows(results, more), [], facts,
        [f"{one['lora']} at guidance {one['guidance']:g}: {one['verdict']}." for one in composed]).encode())


def _interval(figures: Mapping[str, float | None], name: str) -> str:
    value = figures[name]
    return "–" if value is None else f"{value:.2f} [{figures[f'{name}_low']:.2f}, {figures[f'{name}_high']:.2f}]"


def made_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Where and when rows were measured, and of which weights, once for those that share it: {targets: what}."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if "made" in row:
            found.setdefault("; ".join(f"{name}: {_words(value)}" for name, value in row["made"].items()),
                             {})[row["target"]] = None
    return {", ".join(targets): what for what, targets in found.items()}


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
