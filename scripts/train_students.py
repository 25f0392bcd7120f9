"""Few-step students of several methods on the shipped teachers, for scripts/check_students.py: short trainings that
begin with the shipped students. What is there already is left; what was stopped goes on.

    PYTHONPATH=$PWD python scripts/train_students.py runs/students

writes runs/students/NAME, a run, with NAME/export/lora in it: some 15 minutes on one CPU core.
"""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stepdistill import api

# name -> recipe, the shipped student that it begins with, updates
STUDENTS: dict[str, tuple[str, str, int]] = {
    "tcd": ("shapes/tcd", "shapes-lcm", 60),
    "pcm": ("shapes/pcm", "shapes-lcm", 40),
    "tdm": ("shapes/tdm", "shapes-dmd2", 40),
    "swiftbrush": ("shapes/swiftbrush", "shapes-dmd2-1step", 40),
    "sd3-tdm": ("shapes-sd3/tdm", "shapes-sd3-dmd2", 40),
    "sd3-lcm": ("shapes-sd3/lcm", "shapes-sd3-dmd2", 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STUDENTS)}")
    args = parser.parse_args()
    api.quiet()
    for name in args.names or STUDENTS:
        train(name, args.out / name)


def train(name: str, out: Path) -> Path:
    """The folder of the student's export."""
    recipe, start, updates = STUDENTS[name]
    exported = out / "export" / "lora"
    if not exported.is_dir():
        overrides: dict[str, Any] = {"student": {"from": f"assets/students/{start}"}, "data.batch": 32,
                                     "train.updates": updates, "train.warmup": 5, "train.ema": 0.9,
                                     "train.checkpoint_every": 10, "train.doctor": "off"}
        if recipe.endswith(("tcd", "pcm", "lcm")):
            overrides["data.count"] = 512
        run = api.train(recipe, out=out, resume="auto", **overrides)
        exported = api.export(run)
    print(f"{name}: {exported}")
    return exported


if __name__ == "__main__":
    main()
