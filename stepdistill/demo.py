"""The main job, start to end: distils the shipped teacher, exports the LoRA, measures it, and draws the curve.

    python -m stepdistill.demo [--out DIR]
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from . import resources
from .cli import answer, working
from .cli.printing import show, tell
from .recipe import Recipe
from .recipe.yaml import parse_set

if TYPE_CHECKING:
    from .evaluation.plans import Target
    from .evaluation.report import Results

NFE, FEW, MANY = (1, 2, 4, 8), 4, 50
SHIPPED = "assets/shapes-sd/results.json"         # the teacher's rows, measured once


def demo(recipe: Recipe, out: Path, samples: int | None = None) -> Results:
    """Everything lands in `out`, which is a run folder. samples: pictures a row, those of the shipped figures unless
    given."""
    api = working()
    from .run.sources import source_of
    from .run.telling import spoken
    with spoken():
        begun = time.perf_counter()
        tell(f"training {recipe.name}: {recipe.train.updates} updates of {recipe.method}")
        run = api.train(recipe, out=out)
        folder = api.export(run, "lora")
        tell(f"exported and proved: {folder}")
        student = api.open_target(folder, "student")
        teacher = api.open_target(source_of(recipe), "teacher").target
        results = measure(student.target, teacher, student.guidance, run, samples,
                          resources.locate(recipe.teacher.base))
        pictures(student.target, teacher, student.guidance, run / "samples.png")
        api.export(run, "lora")                     # once more: the model card now holds the table
        _conclude(results, run, folder, time.perf_counter() - begun)
    return results


def measure(student: Target, teacher: Target, scale: float, out: Path, samples: int | None,
            source: Path | None) -> Results:
    """The student at each of NFE and the teacher at FEW, measured here; the teacher at MANY as shipped, if that is
    comparable.

    source: the teacher's folder; shipped figures are those of the shipped teacher alone.
    """
    from .evaluation.report import join, read_results, write_report, write_results
    from .evaluation.sweep import bench
    file = resources.locate(SHIPPED)
    shipped = None if file is None or source != file.parent else read_results(file)
    samples = samples or (shipped["protocol"]["samples"] if shipped else 2000)
    features = resources.locate("assets/shapes-clip")
    bench([student], NFE, samples, out, features=[features], say=tell)
    # unguided: twice the steps
    results = bench([teacher], (FEW,), samples, out, (1.0, scale), features=[features], say=tell)
    if shipped is None or shipped["protocol"]["id"] != results["protocol"]["id"]:
        tell(f"the shipped figures of the teacher do not apply here: measuring it at {MANY} evaluations too")
        return bench([teacher], (MANY,), samples, out, (scale,), features=[features], say=tell)
    results = join(shipped, results)
    write_results(results, out)
    write_report(results, out)
    return results


def pictures(student: Target, teacher: Target, scale: float, path: Path, count: int = 8) -> None:
    """Rows from the same noise: the teacher at its ease, the teacher in a hurry, the student."""
    import torch

    from .data.prompts import open_prompts
    from .evaluation.plans import plans
    from .evaluation.sheets import sheet
    ids = torch.arange(count)
    prompts = open_prompts("shapes", seed=1).captions(ids)
    rows = [*plans(teacher, (FEW, MANY), (scale,), ("dpmpp_2m",), tell)[::-1],
            *plans(student, (FEW, 1), (scale,), (), tell)[::-1]]
    sheet([row.images(prompts, ids, 0) for row in rows], path, [f"{row.target.name}, {row.nfe} NFE" for row in rows])


def closed(results: Results) -> dict[str, float]:
    """The best Fréchet distances, and the share of the teacher's gap that the student closes at FEW evaluations."""
    def best(name: str, nfe: int) -> float:
        return min(row["metrics"]["fd"] for row in results["rows"] if row["target"].split(":")[0] == name
                   and row["nfe"] == nfe)
    few, many, student = best("teacher", FEW), best("teacher", MANY), best("student", FEW)
    return {"teacher_few": few, "teacher_many": many, "student": student, "closed": (few - student) / (few - many)}


def _conclude(results: Results, run: Path, folder: Path, seconds: float) -> None:
    from .evaluation.report import table
    show(table(results))
    found = closed(results)
    tell(f"FD at {FEW} evaluations: teacher {found['teacher_few']:.3f}, student {found['student']:.3f}; teacher "
              f"at {MANY}: "
              f"{found['teacher_many']:.3f}. The student closes {found['closed']:.0%} of the gap.")
    tell(f"{seconds / 60:.1f} minutes. Look at:")
    for path, what in ((run / "curve.png", "quality against network evaluations"),
                       (run / "samples.png", "teacher and student"),
                       (run / "report.html", "all of it"),
                       (folder, "the LoRA, its scheduler, its settings and its card")):
        tell(f"  {path}  {what}")
    tell(f'try: stepdistill sample {quote(str(folder))} --prompt "a red ring left of a blue square on a plain navy '
         'background"')


def _arguments() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m stepdistill.demo", description=demo.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}")
    parser.add_argument("--recipe", default="shapes/lcm-demo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change an entry of the recipe")
    parser.add_argument("--samples", type=int, help="pictures a row of the table")
    given = parser.parse_args()
    return {"recipe": Recipe.load(given.recipe, parse_set(given.set)), "out": given.out, "samples": given.samples}


if __name__ == "__main__":
    answer(lambda: demo(**_arguments()))
