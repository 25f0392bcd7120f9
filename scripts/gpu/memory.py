"""Peak memory by phase and seconds an update, of real networks with random weights, beside what `plan` forecasts.

Held are the frozen bfloat16 base, the adapters (or three full copies), their gradients and moments, activations, and a
data set of 8 random latents and conditions. Text encoders and codec are tiny: trainings on cached data do not need
them.
"""
from __future__ import annotations

import gc
import multiprocessing
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import internals
import torch
from common import GB, Clock, Record, device_of, parser, sync
from pipelines import random_weights, write_pipeline

WARM, TIMED = 2, 4                    # updates
PLAIN = ("sd15",)                     # without gradient checkpointing
FULL = "3 full copies"
CASES = [("sd15", "lcm", "lora"), ("sd15", "dmd2", "lora"), ("sdxl", "dmd2", "lora"), ("sd35-medium", "dmd2", "lora"),
         ("sd15", "dmd2", FULL), ("z-image", "dmd2", "lora"), ("flux2-klein-4b", "dmd2", "lora"),
         ("sdxl", "lcm", "lora"), ("sd35-medium", "lcm", "lora")]


def main() -> None:
    args = parser(__doc__).parse_args()
    clock, device = Clock(args.seconds), device_of(args)
    internals.quiet()
    record = Record("memory", args, device)
    cases = [("tiny", "lcm", "lora"), ("tiny", "dmd2", "lora")] if args.tiny else CASES
    left = [case for case in cases if not record.has(" ".join(case))]
    with tempfile.TemporaryDirectory() as folder:
        recipes = {case: recipe(case, Path(folder), write_pipeline(case[0], Path(folder) / case[0])) for case in left}
        forecasts = forecasts_of(recipes, args.tiny)
        for case in left:
            if clock.left < 5:
                print(f"no time left for {' '.join(case)}")
                continue
            measured = measure(case[0], recipes[case], device, Path(folder) / "-".join(case))
            record.add(" ".join(case), measured | {"forecast_gb": forecast(forecasts[case], clock)})
            print(line(case, record.figures[" ".join(case)]))
    record.close()


def recipe(case: tuple[str, str, str], folder: Path, teacher: Path) -> dict[str, Any]:
    name, method, roles = case
    role = "full" if roles == FULL else {"lora": {"rank": 4 if name == "tiny" else 64}}
    made = {"method": method, "teacher": str(teacher), "student": role, "guidance": 5.0, "steps": 4,
            "data": {"images": "shapes", "batch": 1},
            "train": {"updates": 1000, "precision": "bf16", "gradient_checkpointing": name not in PLAIN}}
    return made | ({"settings": {"critic_steps": 1, "share_rollout": True}} if method == "dmd2" else {})


# -- the measurement ---------------------------------------------------------------------------------------------------

def measure(name: str, asked: dict[str, Any], device: torch.device, folder: Path) -> dict[str, Any]:
    """Of one case, with nothing of the one before left on the card."""
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    peaks: dict[str, float] = {}
    record_peak(peaks, "load", device)
    start = time.perf_counter()
    with random_weights(name, device):
        trainer = internals.open_trainer(asked, device, folder)
    note(peaks, "load", device)
    held = {"seconds_to_load": round(time.perf_counter() - start, 1), "held_after_load_gb": allocated(device)}
    phased(trainer, peaks, device)
    for index in range(WARM):
        trainer.step(index)
    sync(device)
    start = time.perf_counter()
    for index in range(WARM, WARM + TIMED):
        trainer.step(index)
    sync(device)
    seconds = (time.perf_counter() - start) / TIMED
    reserved = torch.cuda.memory_reserved(device) if cuda else 0
    free, total = torch.cuda.mem_get_info(device) if cuda else (0, 0)
    return held | {"peak_gb": max(peaks.values()), "peak_by_phase_gb": peaks, "reserved_gb": reserved / GB,
                   "card_used_gb": (total - free) / GB, "seconds_an_update": seconds}


def phased(trainer: Any, peaks: dict[str, float], device: torch.device) -> None:
    """Notes the peak of every update's passes and of its optimizers apart."""
    gradients, apply = trainer.gradients, trainer.apply

    def passes(update: Any, *rest: Any) -> None:
        record_peak(peaks, f"{update.name}: forward and backward", device)
        gradients(update, *rest)
        note(peaks, f"{update.name}: forward and backward", device)

    def steps(update: Any, *rest: Any) -> None:
        record_peak(peaks, f"{update.name}: optimizer", device)
        apply(update, *rest)
        note(peaks, f"{update.name}: optimizer", device)

    trainer.gradients, trainer.apply = passes, steps


def record_peak(peaks: dict[str, float], phase: str, device: torch.device) -> None:
    peaks.setdefault(phase, 0.0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def note(peaks: dict[str, float], phase: str, device: torch.device) -> None:
    if device.type == "cuda":
        peaks[phase] = max(peaks[phase], torch.cuda.max_memory_allocated(device) / GB)


def allocated(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / GB if device.type == "cuda" else 0.0


# -- the forecast ------------------------------------------------------------------------------------------------------

def forecasts_of(recipes: dict[tuple[str, str, str], dict[str, Any]], tiny: bool) -> dict[tuple[str, str, str], Future]:
    """By other processes, while the card is measured; a tiny run makes them itself."""
    if tiny:
        return {case: _done(planned(asked)) for case, asked in recipes.items()}
    pool = ProcessPoolExecutor(min(4, len(recipes) or 1), mp_context=multiprocessing.get_context("spawn"))
    found = {case: pool.submit(planned, asked) for case, asked in recipes.items()}
    pool.shutdown(wait=False)
    return found


def planned(asked: dict[str, Any]) -> float:
    return internals.plan(internals.Recipe.load(asked))["peak"] / GB


def _done(value: float) -> Future:
    made: Future = Future()
    made.set_result(value)
    return made


def forecast(found: Future, clock: Clock) -> float | None:
    try:
        return found.result(timeout=max(1.0, clock.left))
    except TimeoutError:
        return None


def line(case: tuple[str, str, str], figures: dict[str, Any]) -> str:
    forecast_gb = figures["forecast_gb"]
    ratio = f"{forecast_gb / figures['peak_gb']:.2f} of the peak" if forecast_gb and figures["peak_gb"] else "no ratio"
    return (f"{' '.join(case)}: peak {figures['peak_gb']:.2f} GB, on the card {figures['card_used_gb']:.2f} GB, "
            f"{figures['seconds_an_update']:.3f} s an update; plan said {forecast_gb or 0:.2f} GB, {ratio}")


if __name__ == "__main__":
    main()
