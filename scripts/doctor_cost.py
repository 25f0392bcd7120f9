"""What a run's doctor costs: the processor's time within its looks over that of the updates beside them.

    python scripts/doctor_cost.py                              # shapes/lcm and shapes/dmd2, with their own batches
    python scripts/doctor_cost.py toy/dmd2 --updates 200

Trains each recipe for some updates with a look every tenth, and says what a look every 100 updates, as a recipe has it
unless it says otherwise, adds to an update; what it does once before the first update stands beside it. Both are of one
process, so what else runs on the machine does not count.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from stepdistill import api  # noqa: E402
from stepdistill.recipe import Recipe  # noqa: E402
from stepdistill.training.doctor import Doctor  # noqa: E402
from stepdistill.training.loop import Trainer  # noqa: E402

EVERY, USUAL = 10, Recipe.load("shapes/lcm").train.doctor_every
PICTURES = 256                     # that are made, since their number is not what is measured


class Clock:
    """Seconds of the processor within some methods, and how often each ran."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def watch(self, kind: type, name: str) -> None:
        """Of kind.name from now on."""
        times = self.spent.setdefault(f"{kind.__name__}.{name}", [])
        method: Callable[..., object] = getattr(kind, name)

        def timed(*args: object) -> object:
            start = time.process_time()
            try:
                return method(*args)
            finally:
                times.append(time.process_time() - start)

        setattr(kind, name, timed)


def measured(name: str, recipe: Recipe) -> str:
    """A line of figures."""
    clock = Clock()
    for kind, method in ((Trainer, "step"), (Doctor, "start"), (Doctor, "look"), (Doctor, "_watch")):
        clock.watch(kind, method)
    with tempfile.TemporaryDirectory() as folder:
        api.train(recipe, out=folder)
    step, start, look, watch = (times for times in clock.spent.values())
    update = sum(step[1:]) / len(step[1:])
    each = sum(look) / len(look) + sum(watch) / len(look)
    return (f"{name}: an update {update:.3f} s; a look {each:.3f} s, once before the first {start[0]:.3f} s: "
            f"{1 + each / (USUAL * update):.4f} x with a look every {USUAL}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["shapes/lcm", "shapes/dmd2"])
    parser.add_argument("--updates", type=int, default=40, help=f"at least {4 * EVERY}")
    args = parser.parse_args()
    api.quiet()
    for name in args.recipes:
        entries = {"train.updates": args.updates, "train.doctor": "warn", "train.doctor_every": EVERY}
        few = {} if name.startswith("toy/") else {"data.count": PICTURES}
        print(measured(name, Recipe.load(name, entries | few)), flush=True)


if __name__ == "__main__":
    main()
