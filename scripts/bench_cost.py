"""What a bench takes: the wall's seconds, and the share of them that networks compute in.

    python scripts/bench_cost.py            # two students and a solver of their teacher, at 1, 2, 4 and 8 evaluations

Networks are those of the pipelines and of the features. Each is timed from the call of its outermost module to its end,
decoding and the encoding of prompts too.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

sys.path.insert(0, str(Path(__file__).parents[1]))

from stepdistill import api  # noqa: E402

ROOT = Path(__file__).parents[1]
TARGETS = ("assets/students/shapes-lcm", "assets/students/shapes-dmd2")
NFE = (1, 2, 4, 8)


class Networks:
    """Seconds within modules that no other module calls."""

    def __init__(self) -> None:
        self.depth, self.begun, self.seconds = 0, 0.0, 0.0
        register_module_forward_pre_hook(self.enter)
        register_module_forward_hook(self.leave, always_call=True)

    def enter(self, module: torch.nn.Module, args: object) -> None:
        if self.depth == 0:
            self.begun = time.perf_counter()
        self.depth += 1

    def leave(self, module: torch.nn.Module, args: object, output: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.seconds += time.perf_counter() - self.begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000, help="of a row")
    parser.add_argument("--nfe", type=int, nargs="+", default=list(NFE))
    args = parser.parse_args()
    api.quiet()
    networks, begun = Networks(), time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        rows = api.bench(*(ROOT / target for target in TARGETS), nfe=args.nfe, samples=args.samples, out=out,
                         solvers=["dpmpp_2m"], guidance=[1.0])["rows"]
    wall = time.perf_counter() - begun
    print(f"{len(rows)} rows of {args.samples:,} samples: {wall:.0f} s, "
          f"{networks.seconds / wall:.0%} of them in networks")


if __name__ == "__main__":
    main()
