"""What commands print: tables, lines, JSON. Nothing here imports torch."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import printable

say = Console()
complain = Console(stderr=True)
WIDE = 1000                         # columns of a pipe


def tell(text: str, console: Console = say) -> None:
    """As it stands: no markup is read in it, and no line is broken, so that paths and commands can be pasted."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def show(table: Table) -> None:
    """In a terminal as wide as it is, with cells on several lines where need be; in a pipe as wide as the table is."""
    (say if say.is_terminal else Console(width=WIDE)).print(table)


def first() -> bool:
    """Whether this is the only process, or the first of several, which speaks for all."""
    from ..parallel import rank
    return rank() == 0


def emit(data: Any, as_json: bool, show: Any) -> None:
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        show()


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(_cell(row[column]))) for column in columns))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def show_results(results: dict[str, Any], out: Path) -> None:
    if "compose" in results:
        own = results["protocol"].get("metrics", {})
        show(table([row | row["metrics"] for row in results["rows"]],
                   ("target", "nfe", "guidance", "to_teacher", "clip_score", "diversity", *own)))
        for one in results["compose"]:
            tell(f"{one['lora']} at guidance {one['guidance']:g}: {one['verdict']}")
        tell(f"wrote {out / 'results.json'}, {out / 'report.html'} and a picture of each LoRA in {out / 'samples'}")
        return
    if "dim" not in results["protocol"]:                       # against the teacher's own pictures
        own = [*(name for name in ("motion", "motion_ratio") if name in results["rows"][0]["metrics"]),
               *results["protocol"].get("metrics", {})]
        show(table([row | row["metrics"] for row in results["rows"]],
                   ("target", "nfe", "guidance", "to_teacher", "clip_score", "diversity", *own, "latency_ms")))
        for sentence in results.get("words", ()):
            tell(sentence)
        tell(f"wrote {out / 'results.json'}, {out / 'report.html'} and {out / 'samples' / 'together.png'}")
        return
    from ..evaluation import report
    show(report.table(results))
    tell(f"wrote {out / 'results.json'}, {out / 'curve.png'} and {out / 'report.html'}")


def show_extracted(found: Any) -> None:
    rows = [{"layer": layer.name, "kept": f"{layer.kept:.1%}", "norm": f"{layer.norm ** 0.5:.3g}"}
            for layer in found.worst()]
    tell(f"the {len(rows)} layers of {len(found.layers)} of which the least is kept:")
    show(table(rows, ("layer", "kept", "norm")))
    tell(f"kept in all: {found.kept:.2%} of the squared difference of these layers")
    if found.beyond:
        tell(f"out of its reach: {', '.join(f'{count} {kind}' for kind, (count, _) in found.beyond.items())}, "
             f"{1 - found.reached:.2%} of the whole squared difference")
    tell(f"wrote {found.folder}; a student begins with it by student: {{from: {found.folder}}}")


def show_checked(found: Any) -> None:
    kind = found.found.best.distance
    rows = [{"call": str(one.way), "NFE": one.way.nfe, kind: one.figure.value, "low": one.figure.low,
             "high": one.figure.high,
             "clip_score": one.clip_score} for one in found.found.last]
    show(table(rows, tuple(rows[0])))
    tell(found.words)


def show_progress(rows: list[Any]) -> None:
    passed = sum(row.passed for row in rows)
    tell(f"{rows[0].method} {rows[0].kind}: {passed} of {len(rows)} rows pass", complain)


def show_proofs(found: dict[str, Any], out: Path) -> None:
    rows = [row | {"passed": "yes" if row["passed"] else "NO"} for row in found["rows"]]
    show(table(rows, ("method", "kind", "check", "figure", "tolerance", "passed")))
    passed = sum(row["passed"] for row in found["rows"])
    for one in found.get("unproved", []):
        tell(f"unproved: {one['method']}, {one['kind']}: {one['why']}")
    drawn = " and a picture of each method beside it" if any(row["kind"] == "convergence" for row in rows) else ""
    tell(f"{passed} of {len(rows)} rows pass on seed {found['seed']}, in {found['seconds']:.0f} s; "
         f"wrote {out / 'verify.json'}{drawn}")


def show_plan(found: dict[str, Any]) -> None:
    rows = [{"role": role, "parameters": f"{row['parameters']:,}", "trained": f"{row['trained']:,}",
             "size": _size(row["bytes"])}
            for role, row in found["roles"].items()]
    show(table(rows, ("role", "parameters", "trained", "size")))
    passes = found["passes"]
    if "stages" in found:
        rows = [{"stage": str(i + 1), "method": row["method"], "steps": row["steps"],
                 "updates": f"{row['passes']['updates']:,}",
                 "forward": row["passes"]["forward"], "backward": row["passes"]["backward"],
                 "batch": row["passes"]["batch"],
                 "peak": _size(row["peak"]), "disk": _size(row["disk"])} for i, row in enumerate(found["stages"])]
        show(table(rows, tuple(rows[0])))
        tell("in all:")
    tell(f"the denoiser and all roles on it: {found['over_base']:g} x its own bytes")
    tell(f"peak memory, roughly {_size(found['peak'])}; disk {_size(found['disk'])}")
    tell(f"network evaluations a step: {passes['forward']} forward, {passes['backward']} backward, "
              f"of {passes['batch']} samples each; {passes['updates']:,} steps")
    tell("downloads: " + (", ".join(found["downloads"]) or "none"))
    if "fit" in found:
        fit = found["fit"]
        changed = " ".join(f"--set '{name}={value}'" for name, value in fit["switches"].items())
        verdict = f"fits with {changed}: then roughly {_size(fit['peak'])}" if changed else "fits"
        if not fit["fits"]:
            verdict = (f"does not fit, not even with {changed}: then roughly {_size(fit['peak'])}" if changed
                       else "does not fit, and no switch is left")
        tell(f"on a card of {_size(fit['memory'])} it {verdict}")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
