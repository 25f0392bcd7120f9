"""What a run says about itself: metrics.jsonl, timings.jsonl, trackers, a progress bar, and lines where there is
none."""
from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from .. import parallel
from ..data.images import read_picture
from ..errors import RequestError
from ..files import records
from ..files.whole import put_aside, write_whole
from .launch import trackers
from .optimizers import TrainConfig

REFRESH = 0.5                     # seconds between redraws of the progress bar
log = logging.getLogger("stepdistill")


def truncate(path: Path, step: int, schema: Any = records.Metrics) -> list[dict[str, Any]]:
    """Drops the rows of a .jsonl file after `step`, and a torn last line. Returns the rows that stay.

    Of lines that are damaged a warning says which, and the file as it was is kept beside.
    """
    if not path.exists():
        return []
    if path.is_dir():
        raise RequestError(f"{path} is a folder, where a run keeps a file of that name: move it elsewhere")
    kept, stay, damaged = [], [], []
    for number, line, row in records.lines(path.read_bytes(), schema):
        if isinstance(row, ValueError) or not isinstance(row.get("step"), int):
            damaged.append(f"line {number}: {row if isinstance(row, ValueError) else 'it has no step'}")
        elif row["step"] <= step and line.endswith(b"\n"):
            kept.append(line)
            stay.append(row)
    if damaged:
        log.warning("%s is damaged (%s): these rows are left out, and the file is kept as %s", path,
                    "; ".join(damaged[:3]),
                    put_aside(path).name)
    write_whole(path, b"".join(kept))
    return stay


def memory(device: torch.device) -> int:
    """Bytes: the most that the GPU held so far, or on other devices what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class _Bar(Progress):
    """How far the training is, and its figures on a line below: 80 columns do not hold both beside each other."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures, overflow="fold")


class Tracker:
    """Collects every step's tensors and, every so often, moves them from the device at once and writes them down.

    Nothing here makes the host wait for the device but `flush`, which is collective: all ranks call it at the same
    step.
    """

    def __init__(self, run_dir: Path, device: torch.device, config: TrainConfig, done: int) -> None:
        self.run_dir, self.device, total = run_dir, device, config.updates
        self.pending: list[tuple[int, dict[str, float], dict[str, Tensor]]] = []
        self.main = parallel.rank() == 0
        self.images, self.paused, self.seconds, self.drawn = 0, 0.0, 0.0, 0.0
        console = Console(stderr=True)
        self.bar = _Bar(TextColumn("training"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
                        TextColumn("left"), TimeRemainingColumn(), auto_refresh=False, console=console,
                        disable=not (self.main and console.is_terminal))
        self.total, self.task = total, self.bar.add_task("training", total=total, completed=done)
        if self.main:
            run_dir.mkdir(parents=True, exist_ok=True)
            truncate(run_dir / "metrics.jsonl", done)
            before = truncate(run_dir / "timings.jsonl", done, records.Timing)
            self.seconds = before[-1]["seconds"] if before else 0.0
            self.boards = trackers(config.trackers, run_dir, done, asdict(config))
        self.since = time.perf_counter()

    def __enter__(self) -> Tracker:
        self.bar.start()
        self.since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        for board in self.boards if self.main else ():
            board.finish()

    def add(self, step: int, rates: dict[str, float], values: dict[str, Tensor], images: int) -> None:
        """After step number `step`, from 1: its learning rates, its losses and norms, () each, and the images that it
        used on all ranks."""
        self.pending.append((step, rates, values))
        self.images += images
        self.bar.update(self.task, completed=step)
        if time.perf_counter() - self.drawn > REFRESH:
            self.bar.refresh()
            self.drawn = time.perf_counter()

    def flush(self) -> tuple[int, str] | None:
        """Writes down what has been added, up to the first value that is not finite. Returns its step and what it
        is."""
        flat = torch.stack([value.detach().float() for _, _, values in self.pending for value in values.values()])
        parallel.all_reduce_mean_([flat])
        numbers = iter(flat.tolist())
        rows = [{"step": step} | {name: _short(next(numbers)) for name in values} | rates
                for step, rates, values in self.pending]
        seconds = time.perf_counter() - self.since - self.paused
        finite = list(takewhile(lambda row: all(map(math.isfinite, row.values())), rows))
        if self.main and finite:
            self._write(finite, seconds)
        self.seconds += seconds
        self.pending, self.images, self.paused, self.since = [], 0, 0.0, time.perf_counter()
        if len(finite) == len(rows):
            return None
        bad = rows[len(finite)]
        return bad["step"], ", ".join(f"{name} of step {bad['step']} is {value}" for name, value in bad.items()
                                      if not math.isfinite(value))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is not training time: checkpoints, pictures, evaluation."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def sync(self) -> None:
        """Forces the logs to the disk: a checkpoint must not know more steps than they do."""
        for name in ("metrics.jsonl", "timings.jsonl") if self.main else ():
            with (self.run_dir / name).open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def picture(self, step: int, file: Path) -> None:
        """Shows a picture of this step to the trackers, if there is one."""
        if not self.main or not self.boards or not file.is_file():
            return
        pixels = ((read_picture(file) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)[None].numpy()
        for board in self.boards:
            board.log_images({"samples": pixels}, step=step,
                             **({"dataformats": "NHWC"} if board.name == "tensorboard" else {}))

    def _write(self, rows: list[dict[str, float]], seconds: float) -> None:
        last, held = rows[-1], memory(self.device)
        rate = self.images / seconds
        timing = {"step": last["step"], "seconds": round(self.seconds + seconds, 3), "images_per_s": round(rate, 2),
                  "seconds_per_step": round(seconds / len(self.pending), 6), "memory_bytes": held}
        for name, lines in (("metrics.jsonl", rows), ("timings.jsonl", [timing])):
            with (self.run_dir / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        shown = {name: value for name, value in (last | timing).items() if name != "step"}
        for board in self.boards:
            board.log(shown, step=last["step"])
        self.bar.figures = ", ".join([*(f"{name.split('/')[1]} {value:.4g}" for name, value in last.items()
                                        if "/" in name and not name.startswith(("grad_norm/", "lr/"))),
                                      f"{rate:.3g} images/s", f"{held / 2**30:.2f} GiB"])
        left = timedelta(seconds=round((self.total - last["step"]) * timing["seconds_per_step"]))
        log.debug(f"step {last['step']:,} of {self.total:,}: {self.bar.figures}, {left} left")


def _short(value: float) -> float:
    """A float32 without the digits that only its float64 image has."""
    return float(f"{value:.8g}")
