"""Updates a second of `lcm` and `dmd2` (one step, no discriminator) against a hand-written loop of the same passes.

The hand-written loop is diffusers, peft and torch alone: a network of its own for each role, guidance in one doubled
call, fused AdamW, clipping, autocast, nothing logged. Both take turns in one process, on the same shapes, dtypes and
adapters.
"""
from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import internals
import torch
from common import Clock, Record, device_of, parser, sync
from hand import Dmd2Loop, LcmLoop
from pipelines import denoiser_of, random_network, random_weights, write_pipeline

LOOPS = {"lcm": LcmLoop, "dmd2": Dmd2Loop}
BATCH = {"sd15": 4, "sdxl": 1, "tiny": 2}
ROUNDS = {"sd15": 8, "sdxl": 6, "tiny": 2}         # turns of each loop
TURN, WARM = {"sd15": 4, "sdxl": 2, "tiny": 1}, 3
# name, method, compiled
CASES = [("sd15", "lcm", False), ("sd15", "dmd2", False), ("sd15", "lcm", True), ("sd15", "dmd2", True),
         ("sdxl", "lcm", False), ("sdxl", "dmd2", False), ("sdxl", "dmd2", True), ("sdxl", "lcm", True)]
COMPILE_SECONDS = 40.0                             # what a compiled case takes at least; it is not begun with less left
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
           "time_emb_proj"]
GUIDANCE, LR = 5.0, 1e-4


def main() -> None:
    args = parser(__doc__).parse_args()
    clock, device = Clock(args.seconds), device_of(args)
    internals.quiet()
    record = Record("throughput", args, device)
    cases = [("tiny", "lcm", False), ("tiny", "dmd2", False)] if args.tiny else CASES
    with tempfile.TemporaryDirectory() as folder:
        for name, method, compiled in cases:
            key = f"{name} {method}{' compiled' if compiled else ''}"
            if record.has(key):
                continue
            if clock.left < (COMPILE_SECONDS if compiled else 10):
                print(f"no time left for {key}")
                continue
            record.add(key, measure(name, method, compiled, device, Path(folder)))
            found = record.figures[key]
            print(f"{key}: {found['updates_per_second']:.2f} updates a second, {found['ratio']:.3f} of the "
                  "hand-written loop's")
    record.close()


def recipe(name: str, method: str, teacher: Path) -> dict[str, Any]:
    made = {"method": method, "teacher": str(teacher),
            "student": {"lora": {"rank": 4 if name == "tiny" else 64, "targets": TARGETS}},
            "guidance": GUIDANCE, "steps": 1 if method == "dmd2" else 4,
            "data": {"images": "shapes", "batch": BATCH[name]},
            "train": {"updates": 100_000, "precision": "bf16", "lr": LR}}
    sharing = {"settings": {"critic_steps": 1, "share_rollout": True, "gan_weight": 0.0}}
    return made | (sharing if method == "dmd2" else {})


def measure(name: str, method: str, compiled: bool, device: torch.device, folder: Path) -> dict[str, Any]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    teacher = write_pipeline(name, folder / name)
    asked = recipe(name, method, teacher)
    with random_weights(name, device):
        trainer = internals.open_trainer(asked, device, folder / f"{name}-{method}")
    hand = LOOPS[method](lambda: network(name, device), trainer.stream.dataset, asked, device)
    start = time.perf_counter()
    if compiled:
        internals.compiled(trainer)
    warm_up = time.perf_counter() - start
    ours, theirs = turns(trainer.step, hand.step, ROUNDS[name], TURN[name], device)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"batch": BATCH[name], "updates_per_second": TURN[name] / median(ours),
            "hand_updates_per_second": TURN[name] / median(theirs),
            "ratio": median(ratios), "ratios": [round(ratio, 4) for ratio in ratios],
            "seconds_to_compile": round(warm_up, 1)}


def network(name: str, device: torch.device) -> torch.nn.Module:
    _, cls, config = denoiser_of(name)
    return random_network(cls, config, torch.bfloat16, device).requires_grad_(False)


def turns(ours: Callable[[int], Any], theirs: Callable[[int], Any], rounds: int, turn: int,
          device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of each turn of `turn` updates, the two loops in alternation, who is first in alternation too."""
    seconds: dict[Callable[[int], Any], list[float]] = {ours: [], theirs: []}
    done = dict.fromkeys(seconds, 0)
    for i in range(-1, rounds):
        for step in (ours, theirs) if i % 2 else (theirs, ours):
            sync(device)
            start = time.perf_counter()
            for _ in range(WARM if i < 0 else turn):
                step(done[step])
                done[step] += 1
            sync(device)
            if i >= 0:
                seconds[step].append(time.perf_counter() - start)
    return seconds[ours], seconds[theirs]


if __name__ == "__main__":
    main()
