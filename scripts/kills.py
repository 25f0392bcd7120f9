"""A long series of kills: commands that are killed, at calls drawn from a seed that bring something to the disk, and
given again.

    python scripts/kills.py --count 100

Trainings of LoRAs and of full weights, accumulated, averaged, with a critic, in stages, with evaluations and on two
processes; pairs, exports and benches. Each is killed one to three times, within checkpoints, pictures, figures and
caches as they are written, and must end as the one that was left alone: weights, optimizers, metrics, pictures, rows.
Prints a line a case, and N of N; status 1 where one is not.
"""
from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tests import kills  # noqa: E402

SHORT = {"train.updates": 6, "train.checkpoint_every": 2, "train.log_every": 1, "evaluate.every": 3, "data.batch": 8}
FIGURES = {"evaluate.nfe": [1], "evaluate.samples": 140, "evaluate.reference": "shapes"}
TINY: dict[str, Any] = {"method": "lcm", "teacher": "teacher", "student": {"lora": {"rank": 2}},
                        "guidance": 2.0, "steps": 2,
                        "data": {"images": "shapes", "batch": 2}, "train": {"updates": 2, "checkpoint_every": 1},
                        "evaluate": {"prompts": ["a red ring"]}}
PAIRS: dict[str, Any] = {"method": "kd", "teacher": "assets/toy", "student": {"lora": {"rank": 2}},
                         "guidance": 2.0, "steps": 1,
                         "data": {"pairs": {"prompts": "assets/toy", "solver": "ddim", "steps": 4}, "count": 600,
                                  "batch": 8}, "train": {"updates": 1}}


def training(name: str, recipe: str, processes: int = 1, **entries: Any) -> kills.Work:
    sets = [part for key, value in (SHORT | entries).items()
            for part in ("--set", f"{key.replace('__', '.')}={json.dumps(value)}")]
    return kills.Work(name, lambda folder: ["train", recipe, *sets, "--out", "run", "--resume", "auto"],
                      kills.of_runs, processes)


def works(folder: Path) -> list[kills.Work]:
    """Every kind. What they read is made in the folder first."""
    from tiny import save_tiny

    import stepdistill
    save_tiny(folder / "teacher")
    (folder / "tiny.yaml").write_text(json.dumps(TINY | {"teacher": str(folder / "teacher")}))
    (folder / "pairs.yaml").write_text(json.dumps(PAIRS))
    run = stepdistill.train(folder / "tiny.yaml", out=folder / "trained")
    given: Callable[..., Callable[[Path], Sequence[object]]] = lambda *arguments: lambda _: arguments
    return [
        training("a LoRA", "toy/lcm"), training("full weights", "toy/lcm", student="full"),
        training("accumulated", "toy/lcm", train__accumulate=2), training("averaged", "toy/lcm", train__ema=0.5),
        training("a critic", "toy/dmd2"),
        training("stages", "toy/progressive", **{"train.updates": 3, "train.checkpoint_every": 1}),
        training("two processes", "toy/lcm", 2), training("a pipeline", str(folder / "tiny.yaml"), **{"data.batch": 2}),
        training("figures", str(folder / "tiny.yaml"), **{"data.batch": 2}, **FIGURES),
        kills.Work("pairs", given("pairs", folder / "pairs.yaml", "--out", "made"), kills.of_tensors),
        kills.Work("an export", given("export", run, "--to", "lora", "--out", "made"), kills.of_tensors),
        kills.Work("an export of a pipeline", given("export", run, "--to", "pipeline", "--out", "made"),
                   kills.of_tensors),
        kills.Work("a bench", given("bench", run, "--nfe", "1,2", "--samples", "2", "--reference", "teacher", "--out",
                                    "made"), kills.of_benches),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="cases, each of up to three kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose names begin so")
    asked = parser.parse_args()
    draw, good, struck = random.Random(asked.seed), 0, 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        every = [work for work in works(folder) if work.name.startswith(asked.only)]
        counts: dict[str, dict[str, int]] = {}
        for i in range(asked.count):
            work = every[i % len(every)]
            whole = folder / f"whole {work.name}"
            if work.name not in counts:
                counts[work.name] = kills.counted(work, whole)
            where, differs = kills.strike(work, whole, counts[work.name], folder / f"case {i}", draw)
            good, struck = good + (not differs), struck + len(where)
            print(f"{i + 1} {work.name}: killed at {', '.join(where) or 'nothing'}: "
                  f"{'; '.join(differs[:3]) or 'the same'}", flush=True)
    print(f"{good} of {asked.count} are the same after {struck} kills")
    return int(good != asked.count)


if __name__ == "__main__":
    sys.exit(main())
