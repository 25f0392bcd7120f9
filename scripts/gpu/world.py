"""The table of methods at full length on this card: recipes of the shipped teacher, trained and measured, several seeds
of each.

Trainings of so small a network wait for the host most of the time, so several run at once. A row is a recipe and a
seed: what was trained, in how many minutes beside how many others, and the student's figures. What is not finished in
time goes on from its last checkpoint when the script is called again on the same machine.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import internals
import torch
from common import ROOT, Clock, Record, device_of, parser

WANTED = ("lcm", "dmd2", "dmd2-1step", "sid", "tcd", "add", "ladd", "cd", "scm", "lightning", "progressive",
          "swiftbrush", "kd",
          "reflow", "diff_instruct", "dmd", "tract", "guided", "kd-4step")
RUNS, TEACHER = ROOT / "runs/gpu", ROOT / "assets/shapes-sd/results.json"
SAMPLES, POLL = 2000, 0.5
TINY = {"data.count": 64, "data.batch": 4, "train.updates": 2, "train.warmup": 0, "train.checkpoint_every": None,
        "student.lora.rank": 2}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--jobs", type=int, default=5, help="trainings at once")
    made.add_argument("--recipes", nargs="*", default=WANTED)
    made.add_argument("--fill", action="store_true", help="make the cached latents that trainings share, and stop")
    made.add_argument("--one", nargs=3, metavar=("RECIPE", "SEED", "FOLDER"), help=argparse.SUPPRESS)
    args = made.parse_args()
    clock, device = Clock(args.seconds), device_of(args)
    internals.quiet()
    if args.one:
        name, seed, folder = args.one
        row(name, int(seed), Path(folder), args.tiny, device)
        return
    if args.fill:
        internals.fill_cache(recipe(WANTED[0], 0, args.tiny), device)
        return
    record = Record("world", args, device)
    recipes, seeds = (("lcm",), 1) if args.tiny else (args.recipes, args.seeds)
    left = [(name, seed) for name in recipes for seed in range(seeds) if not record.has(f"{name} {seed}")]
    if args.again:
        shutil.rmtree(RUNS, ignore_errors=True)
    if left:
        internals.fill_cache(recipe(*left[0], args.tiny), device)     # once, before several want it
        work(left, record, clock, args)
    record.close()


def recipe(name: str, seed: int, tiny: bool) -> internals.Recipe:
    return internals.Recipe.load(f"shapes/{name}", {"train.seed": seed} | (TINY if tiny else {}))


# -- one row -----------------------------------------------------------------------------------------------------------

def row(name: str, seed: int, folder: Path, tiny: bool, device: torch.device) -> None:
    """Trains what is left to train, measures, and writes folder/row.json."""
    asked = recipe(name, seed, tiny)
    run = folder / "run"
    if not internals.is_run(run) or not internals.finished(run, asked):
        internals.train(asked, out=run, resume=internals.is_run(run))
    start = time.perf_counter()
    nfe, samples, reuse = ([1], 200, []) if tiny else (sorted({1, 2, 4, 8, asked.steps}), SAMPLES, [TEACHER])
    results = internals.bench_student(run, nfe, samples, folder / "bench", reuse, device)
    timings = [json.loads(each.read_text().splitlines()[-1]) for each in
               (stage / "timings.jsonl" for stage in internals.stage_folders(asked, run))]
    rows = [each for each in results["rows"] if each["method"] == asked.method]
    figures = {"recipe": f"shapes/{name}", "seed": seed, "method": asked.method, "steps": asked.steps,
               "updates": sum(stage.train.updates for stage in asked.stages), "rows": rows,
               "protocol": results["protocol"],
               "minutes": sum(each["seconds"] for each in timings) / 60,
               "seconds_of_bench": time.perf_counter() - start}
    (folder / "row.json").write_text(json.dumps(figures), encoding="utf-8")


# -- many --------------------------------------------------------------------------------------------------------------

def work(left: list[tuple[str, int]], record: Record, clock: Clock, args: argparse.Namespace) -> None:
    """Keeps `jobs` of them running until all are done or the time is over; then ends those that run."""
    running: dict[tuple[str, int], subprocess.Popen] = {}
    waiting = iter(left)
    try:
        while clock.left > 0:
            for job in _next(waiting, args.jobs - len(running)):
                running[job] = _start(job, args.tiny, args.jobs)
            if not running:
                return
            time.sleep(POLL)
            for job, process in [(job, process) for job, process in running.items() if process.poll() is not None]:
                del running[job]
                _finish(job, process.returncode, record, args.jobs)
    finally:
        for job, process in running.items():
            process.terminate()
            process.wait()
            print(f"{job[0]} seed {job[1]}: no time left; it goes on from its checkpoint")


def _next(waiting: Iterator[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    return [job for _, job in zip(range(count), waiting)]


def _folder(job: tuple[str, int]) -> Path:
    return RUNS / f"{job[0]}-{job[1]}"


def _start(job: tuple[str, int], tiny: bool, jobs: int) -> subprocess.Popen:
    folder = _folder(job)
    if tiny:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--one", job[0], str(job[1]), str(folder), *(["--tiny"] if tiny else [])]
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | threads)


def _finish(job: tuple[str, int], status: int, record: Record, jobs: int) -> None:
    folder = _folder(job)
    if status:
        print(f"{job[0]} seed {job[1]}: status {status}; the end of {folder / 'log.txt'} says:")
        print("\n".join((folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-12:]))
        return
    figures: dict[str, Any] = json.loads((folder
                                          / "row.json").read_text(encoding="utf-8")) | {"trainings_at_once": jobs}
    record.add(f"{job[0]} {job[1]}", figures)
    own = [each for each in figures["rows"] if each["nfe"] == figures["steps"]]
    text = f"FD {own[0]['metrics']['fd']:.2f} at {own[0]['nfe']} NFE" if own else "measured"
    print(f"{job[0]} seed {job[1]}: {figures['updates']} updates in {figures['minutes']:.2f} minutes, {text}")


if __name__ == "__main__":
    main()
