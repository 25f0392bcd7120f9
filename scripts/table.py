"""The table of methods on the shipped teacher. For each recipe: train, measure, export, and write its row and the page.

A row is assets/table/NAME.json: what was trained, and the student's rows of the bench. The teacher's come from
assets/shapes-sd/results.json. Exports lie in runs/table/NAME/export. Those of resources.STUDENTS ship: they replace the
folders of assets/students, once nine of ten pictures have all attributes right.
"""
from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from stepdistill import api, resources
from stepdistill.evaluation import sweep
from stepdistill.evaluation.curve import DASHES, INK, lines
from stepdistill.evaluation.report import read_results
from stepdistill.files.whole import write_whole
from stepdistill.methods import METHODS
from stepdistill.recipe import Recipe
from stepdistill.recipe.catalogue import builtin
from stepdistill.run import folder as runs

ROOT = Path(__file__).parents[1]
TABLE, STUDENTS, TEACHER = ROOT / "assets/table", ROOT / "assets/students", ROOT / "assets/shapes-sd/results.json"
FIGURE, PAGE = ROOT / "assets/figures/methods.png", ROOT / "docs" / "results.md"
NFE, SAMPLES, SHIPPED = (1, 2, 4, 8), 2000, 0.9
SOLVERS = ("ddim", "heun", "dpmpp_2m")
START, END = "<!-- table of methods: scripts/table.sh -->", "<!-- end of the table -->"
COLOURS = {"consistency": "#1c7ed6", "trajectory": "#2f9e62", "distribution": "#d9480f", "adversarial": "#9c36b5",
           "hybrid": "#e67700"}
MARKERS = "oDs^vP*X<>phd8"


def main() -> None:
    known = [name.removeprefix("shapes/") for name in builtin() if name.startswith("shapes/")
             and not name.endswith(("-demo", "-negative"))]              # of the latter speaks scripts/negative.py
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(known)}")
    parser.add_argument("--commit", action="store_true", help="commit each row as it comes")
    parser.add_argument("--write", action="store_true",
                        help="write docs/results.md and the figure from the rows that there are, and stop")
    args = parser.parse_args()
    if unknown := sorted(set(args.recipes) - set(known)):
        parser.error(f"there is no recipe shapes/{unknown[0]}: there are {', '.join(known)}")
    api.quiet()
    for name in () if args.write else args.recipes or known:
        measure(name)
        write()
        if args.commit:
            subprocess.run(["git", "add", "assets", "docs"], cwd=ROOT, check=True)
            subprocess.run(["git", "commit", "-m", f"table: shapes/{name}"], cwd=ROOT, check=True)
    write()


def measure(name: str) -> None:
    """Trains what is left to train, benches, and writes the row and the export."""
    run, recipe = ROOT / "runs/table" / name, Recipe.load(f"shapes/{name}")
    if not runs.is_run(run) or not runs.finished(run, recipe):
        api.train(recipe, out=run, resume=runs.is_run(run))
    target = api.open_target(run, f"shapes-{name}").target
    results = sweep.bench([target], NFE, SAMPLES, run, reuse=[TEACHER])
    rows = [row for row in results["rows"] if row["target"] == target.name]
    seconds = sum(json.loads((folder / "timings.jsonl").read_text().splitlines()[-1])["seconds"]
                  for folder in runs.stage_folders(recipe, run))
    kept = {"recipe": f"shapes/{name}", "method": recipe.method, "steps": recipe.steps, "minutes": seconds / 60,
            "updates": sum(stage.train.updates for stage in recipe.stages),
            "protocol": results["protocol"], "rows": rows}
    write_whole(TABLE / f"{name}.json", (json.dumps(kept, indent=1) + "\n").encode())
    right = next(row for row in rows if row["nfe"] == recipe.steps)["metrics"]["all_attributes"]
    ships = target.name in resources.STUDENTS and right >= SHIPPED
    if ships:
        shutil.rmtree(STUDENTS / target.name, ignore_errors=True)
    scale = target.call["guidance_scale"]                # above 1 where the student has a guidance embedding
    out = api.export(run, "lora" if recipe.student.lora else "pipeline", None if scale == 1 else scale,
                     STUDENTS / target.name if ships else None)
    shutil.copy(run / "results.json", out / "results.json")


def rows() -> dict[str, dict[str, Any]]:
    """The rows that there are, family by family."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(TABLE.glob("*.json"))}
    order = list(METHODS)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[1]["method"]), item[0])))


def write() -> None:
    """The table of docs/results.md and the figure."""
    found, teacher = rows(), read_results(TEACHER)["rows"]
    every, best, _ = lines(teacher)
    solvers = {name: every[f"teacher:{name}"] for name in SOLVERS}
    few = next(row for row in best if row["nfe"] == 4)["metrics"]["fd"]
    many = next(row for row in best if row["nfe"] == 50)["metrics"]["fd"]
    text = ["| recipe | family | updates | minutes | " + " | ".join(f"FD at {n} NFE" for n in NFE)
            + " | all attributes | gap closed |",
            "|---|---|" + "---|" * (len(NFE) + 4)]
    text += [_teacher_line(name, some) for name, some in solvers.items()]
    text += [_line(name, student, few, many) for name, student in found.items()]
    whole = PAGE.read_text(encoding="utf-8")
    before, after = whole.split(START)[0], whole.split(END)[1]
    PAGE.write_text(before + START + "\n\n" + "\n".join(text) + "\n\n" + END + after, encoding="utf-8")
    write_whole(FIGURE, figure(found, solvers))


def _teacher_line(solver: str, rows: Sequence[Mapping[str, Any]]) -> str:
    found = {row["nfe"]: f"{row['metrics']['fd']:.2f}" for row in rows}
    others = "".join(f"; {fd} at {n}" for n, fd in found.items() if n not in NFE)
    return f"| *teacher, {solver}{others}* | | | | " + " | ".join(found.get(n, "") for n in NFE) + " | | |"


def _line(name: str, student: dict[str, Any], few: float, many: float) -> str:
    at = {row["nfe"]: row["metrics"] for row in student["rows"]}
    cells = [f"{at[n]['fd']:.2f}" if n in at else "" for n in NFE]
    own = at[student["steps"]]
    cells[NFE.index(student["steps"])] = f"**{own['fd']:.2f}** [{own['fd_low']:.2f}, {own['fd_high']:.2f}]"
    return (f"| `{student['recipe']}` | {METHODS[student['method']].family} | {student['updates']:,} | "
            f"{student['minutes']:.0f} | " + " | ".join(cells)
            + f" | {own['all_attributes']:.1%} | {(few - own['fd']) / (few - many):.0%} |")


def figure(found: Mapping[str, dict[str, Any]], solvers: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """FD against NFE, both logarithmic: methods in their family's colour, the teacher's solvers as the lines to
    beat."""
    drawn = Figure(figsize=(9.5, 5.6), dpi=140)
    FigureCanvasAgg(drawn)
    axis, seen = drawn.subplots(), dict.fromkeys(COLOURS, 0)
    for name, some in solvers.items():
        axis.plot([row["nfe"] for row in some], [row["metrics"]["fd"] for row in some], color=INK, lw=1.8,
                  ls=DASHES[name],
                  label=f"teacher, {name}")
    for name, student in found.items():
        family = METHODS[student["method"]].family
        points = sorted((row["nfe"], row["metrics"]["fd"]) for row in student["rows"])
        axis.plot(*zip(*points), color=COLOURS[family], lw=1.1, alpha=0.8, marker=MARKERS[seen[family] % len(MARKERS)],
                  ms=5, label=name)
        seen[family] += 1
    axis.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Fréchet distance")
    axis.set_xticks([1, 2, 4, 8, 16, 50], ["1", "2", "4", "8", "16", "50"])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_locator(NullLocator())
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn.tight_layout()
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
