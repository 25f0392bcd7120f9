"""Whether `stepdistill check` finds how students are called, of which it gets the tensors alone.

    PYTHONPATH=$PWD python scripts/train_students.py runs/students
    PYTHONPATH=$PWD python scripts/check_students.py runs/students --out runs/check

Takes the four shipped students and those of scripts/train_students.py that are there, strips them of everything but
their tensors, renames them, loses an alpha in three, and checks each. A call is recovered where its Fréchet distance to
real pictures is at most 1.1 times that of the true call. Rows lie in OUT/results.json, one by one; what is there is
left.
"""
from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from stepdistill import api, resources
from stepdistill.evaluation.plans import Target
from stepdistill.evaluation.reference import ShapesSource
from stepdistill.evaluation.space import Space
from stepdistill.models.given_lora import wearing
from stepdistill.models.sources import Source
from stepdistill.run import lora_check
from stepdistill.run.few_step import Judge, Way
from stepdistill.run.foreign_lora import ForeignLora
from stepdistill.run.sources import located

STUDENTS = resources.SHARE / "assets" / "students"
SHIPPED = {"lcm": "shapes-lcm", "dmd2": "shapes-dmd2", "dmd2-1step": "shapes-dmd2-1step", "sd3-dmd2": "shapes-sd3-dmd2"}
LOST = {"lcm": 0.25, "dmd2-1step": 2.0, "pcm": 0.125}         # alpha over rank, which the tensors alone do not say
BOUND, FIGURES = 1.1, 4000                                    # of recovered calls; pictures behind the ratio
SEED = 1                                                      # of those, other than the check's own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of scripts/train_students.py")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/check"))
    parser.add_argument("--samples", type=int, default=2000, help="pictures of the last round")
    args = parser.parse_args()
    api.quiet()
    exports = {name: STUDENTS / folder for name, folder in SHIPPED.items()}
    exports |= {run.name: run / "export" / "lora" for run in sorted(args.runs.glob("*"))
                if (run / "export" / "lora").is_dir()}
    file = args.out / "results.json"
    args.out.mkdir(parents=True, exist_ok=True)
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for number, name in enumerate(args.names or exports):
        if name not in rows:
            rows[name] = row(exports[name], args.out / f"mystery-{number}.safetensors", LOST.get(name, 1.0),
                             args.samples)
            file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        print(name, {key: rows[name][key] for key in ("true", "found", "ratio", "recovered", "cpu_seconds")})


def row(export: Path, bare: Path, scale: float, samples: int) -> dict[str, Any]:
    """What is found of an export of which only tensors are left, in a file called `bare`; scale: what its lost alpha
    makes it count."""
    told = ForeignLora.open(export)
    save_file({key: value / scale if ".lora_B." in key else value for key, value in load_file(told.file).items()}, bare)
    base = located(Source.of(told.settings["teacher"]))
    begin, cpu = time.perf_counter(), time.process_time()
    found = api.check(bare, base.base, samples=samples)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    true, ours = _true(told, base, scale), found.way
    ratio = 1.0 if _same(true, ours) else _ratio(ForeignLora.open(bare), base, true, ours)
    return {"true": str(true), "found": str(ours), "scale": [scale, ours.scale], "steps": [true.steps, ours.steps],
            "ratio": ratio,
            "recovered": ratio <= BOUND, "seconds": seconds, "cpu_seconds": cpu, "samples": samples,
            "check": found.plain}


def _true(told: ForeignLora, base: Source, scale: float) -> Way:
    return replace(told.claim(lora_check.load_teacher(base)).way, scale=scale)


def _same(one: Way, other: Way) -> bool:
    """Whether two ways draw the same pictures."""
    return (type(one.scheduler), dict(one.scheduler.config), dict(one.call), one.scale) == (
        type(other.scheduler), dict(other.scheduler.config), dict(other.call), other.scale)


def _ratio(lora: ForeignLora, base: Source, true: Way, ours: Way) -> float:
    """The Fréchet distance to real pictures at our call over that at the true one, as a bench takes it."""
    teacher, weights = lora_check.worn(lora, base, None)
    folder = resources.SHARE / "assets/shapes-clip"
    source = ShapesSource()
    space = Space.load(folder, source, "cpu", print)
    target = Target("base", teacher.loaded, given=teacher.call)
    judge = Judge(target, space.features, space.reference, source.prompts(FIGURES), SEED, FIGURES, 100,
                  wearing(teacher.network, weights))
    return judge(ours, FIGURES).figure.value / judge(true, FIGURES).figure.value


if __name__ == "__main__":
    main()
