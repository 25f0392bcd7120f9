"""How far long work has come: a bar in a terminal, lines elsewhere."""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 10.0                      # seconds between lines
log = logging.getLogger("stepdistill")


@contextmanager
def meter(shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Yields report(what, done, total), to be called whenever something was done. shown: whether there is a bar.

    Lines are of the level DEBUG, since a terminal has the bar; the first one of a thing comes with its first report.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        # what -> its bar, when it began and with how many done
        tasks: dict[str, tuple[int, float, int]] = {}
        said: dict[str, float] = {}

        def report(what: str, done: int, total: int) -> None:
            now = time.perf_counter()
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total), now, done
            task, since, first = tasks[what]
            bar.update(task, completed=done, visible=done < total)
            if done == total or now - said.get(what, -EVERY) >= EVERY:
                said[what] = now
                log.debug(f"{what}: {done:,} of {total:,}" + _left(done - first, total - done, now - since))
        yield report


def _left(done: int, left: int, seconds: float) -> str:
    return f", {duration(seconds / done * left)} left" if done and left else ""


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
