"""Records what healthy runs look like: trains the toy recipe of every method, and two of pictures, and writes
stepdistill/training/bands.json.

    python scripts/doctor_bands.py --out /tmp/bands                # trains what is not there yet, then writes the bands
    python scripts/doctor_bands.py --out /tmp/bands lcm dmd2       # of these methods; the others keep their bands

A band's edge is the farthest that a signal stayed for as many looks in a row as a finding takes, over all runs of a
method, past the first part of each, and as far again to the side that a rule looks at (half of what is left of a signal
with bounds). A recipe is trained at three lengths, since a short run ends where a long one is on its way.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from stepdistill import api  # noqa: E402
from stepdistill.recipe import Recipe  # noqa: E402
from stepdistill.recipe.catalogue import builtin  # noqa: E402
from stepdistill.run.folder import stage_folders  # noqa: E402
from stepdistill.training.diagnosis import BANDS, PATIENCE, RULES, YOUNG  # noqa: E402
from stepdistill.training.doctor import SIGNALS  # noqa: E402

SHARES = {0.05: 1, 0.1: 0, 0.25: 2}             # of a recipe's updates that are trained, and the seed
LOOKS = 14                                      # of a run
BOUNDED = {"following": (0.0, 1.0), "angle": (-1.0, 1.0), "unfit": (0.0, 1.0), "accuracy": (0.0, 1.0),
           "share": (0.0, 1.0),
           "clipped": (0.0, 1.0), "saturation": (0.0, 1.0)}
WIDER = 2.0                                     # factor of a signal that has no bounds
LEAST = {"offset": 0.3, "saturation": 0.1, "lag": 2.0, "spread": 1.5, "diversity": 1.5, "moved": 0.05, "clipped": 0.95,
         "share": 0.99}
"""Upper edges that are no lower, whatever a short run reached."""
MOST = {"angle": -0.96}
"""Lower edges that are no higher: terms that all but undo each other are what is looked for."""
# updates of those that show what the plane has not: detail within a sample
PICTURES = {"shapes/lcm": 24, "shapes/dmd2-1step": 24}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for share, seed in SHARES.items():
        for name in [name for name in builtin() if name.startswith("toy/")]:
            recipe = Recipe.load(name)
            updates = max(60, round(share * recipe.train.updates))
            train(recipe, args.out / f"{recipe.name}-{share}", args.methods,
                  {"train.updates": updates, "train.seed": seed})
    for name, updates in PICTURES.items():
        train(Recipe.load(name), args.out / name.replace("/", "-"), args.methods,
              {"train.updates": updates, "data.batch": 4, "data.count": 64})
    rows: dict[str, list[list[dict[str, float]]]] = {}
    for method, run in recorded(args.out):
        rows.setdefault(method, []).append(run)
    bands = json.loads(BANDS.read_text(encoding="utf-8"))["bands"] if args.methods else {}
    bands |= {method: band for method, runs in rows.items()
              if method in (args.methods or rows) and (band := edges(runs))}
    BANDS.write_text(json.dumps({"command": "python scripts/doctor_bands.py --out DIR",
                                 "bands": dict(sorted(bands.items()))}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {BANDS}: {len(bands)} methods, {sum(map(len, rows.values()))} runs recorded")


def train(recipe: Recipe, run: Path, methods: list[str], changes: dict[str, int]) -> None:
    if methods and not {stage.method for stage in recipe.stages} & {*methods} or (run / "done").exists():
        return
    updates = changes["train.updates"]
    every = max(1, updates // LOOKS)
    api.train(Recipe.load(recipe.resolved(), changes | {"train.warmup": min(recipe.train.warmup, updates // 5),
                                                        "train.log_every": every,
                                                        "train.doctor": "warn", "train.doctor_every": every}), out=run)
    (run / "done").touch()


def recorded(out: Path) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """(method, rows past the first part) of every stage of every run."""
    for done in sorted(out.glob("*/done")):
        recipe = Recipe.load(done.parent / "recipe.yaml")
        for stage, place in zip(recipe.stages, stage_folders(recipe, done.parent), strict=True):
            if not (place / SIGNALS).is_file():                  # a student that waits longer than the run is
                continue
            rows = [json.loads(line) for line in (place / SIGNALS).read_text(encoding="utf-8").splitlines()]
            first = rows[0]["step"]
            yield stage.method, [row for row in rows if row["step"] > first + YOUNG * (stage.train.updates - first)]


def edges(runs: list[list[dict[str, float]]]) -> dict[str, list[float]]:
    """Signal -> [low, high], of signals that a rule looks at."""
    found: dict[str, list[float]] = {}
    for signal in sorted({name for run in runs for row in run for name in row}):
        if not any(rule.limit is None and signal.startswith(rule.signal) for rule in RULES):
            continue
        windows = [values[i:i + PATIENCE] for run in runs for values in [[row[signal] for row in run if signal in row]]
                   for i in range(len(values) - PATIENCE + 1)]
        if windows:
            found[signal] = [float(f"{edge:.4g}") for edge in wider(signal.partition("/")[0], min(map(max, windows)),
                                                                    max(map(min, windows)))]
    return found


def wider(kind: str, low: float, high: float) -> tuple[float, float]:
    if kind in BOUNDED:
        least, most = BOUNDED[kind]
        low, high = (min(low - (low - least) / 2, MOST.get(kind, low)), high + (most - high) / 2
                     if kind != "saturation" else WIDER * high)
    else:
        low, high = low / WIDER, high * WIDER
    return low, max(high, LEAST.get(kind, high))


if __name__ == "__main__":
    main()
