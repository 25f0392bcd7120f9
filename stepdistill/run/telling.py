"""What long work says while it runs: lines on standard error, and in the run's train.log.

Whoever has something to say says it to the logger `stepdistill`: INFO to everybody, DEBUG where no progress bar shows
it. A handler of one's own on that logger takes the place of the one on standard error.
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from .. import parallel
from ..errors import printable

FILE = "train.log"
log = logging.getLogger("stepdistill")


class _Plain(logging.Formatter):
    """With nothing that a terminal would obey, and without tokens."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Lines(logging.Handler):
    """On standard error as it is at the moment, which a progress bar may have taken over."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


@contextmanager
def spoken() -> Iterator[None]:
    """While it lasts, or the function that it decorates, rank 0 says on standard error what `log` is told, with the
    time where that is no terminal."""
    if log.handlers:
        yield
        return
    terminal = sys.stderr.isatty()
    lines = _Lines(logging.INFO if terminal else logging.DEBUG)
    lines.setFormatter(_Plain("%(message)s" if terminal else "%(asctime)s %(message)s", "%H:%M:%S"))
    with _added(lines):
        yield


@contextmanager
def recorded() -> Iterator[MemoryHandler]:
    """Keeps what is said until `write_in` gives it a run's folder, where it is written from then on; an error too."""
    record = MemoryHandler(capacity=1)                     # one that has no target keeps all, one that has keeps none
    with _added(record):
        try:
            yield record
        except BaseException as error:
            record.handle(logging.makeLogRecord({"msg": f"stopped: {type(error).__name__}: {error}"}))
            raise
        finally:
            if record.target is not None:
                record.target.close()


def write_in(run: Path, record: MemoryHandler) -> None:
    """From now on, and what was said before, in run / train.log. Rank 0 writes."""
    if parallel.rank() == 0 and record.target is None:
        file = logging.FileHandler(run / FILE, encoding="utf-8")
        file.setFormatter(_Plain("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        record.setTarget(file)
        record.flush()


@contextmanager
def _added(handler: logging.Handler) -> Iterator[None]:
    """Of rank 0 alone. Other handlers than ours see no more than the level that they were given lets through."""
    handler.addFilter(lambda _: parallel.rank() == 0)
    level, spread = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        log.setLevel(level)
        log.propagate = spread
