"""The command's own main function in this process, held to its contract: status 0 or 2, one paragraph, no traceback, no
hang, and no file changed but where it was to write."""
from __future__ import annotations

import io
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import psutil

from stepdistill import cli
from stepdistill.training.stopping import SIGNALS

# of this process; on the clock, where others compute too, ten times as long
SECONDS = 20
# bytes of addresses beyond those of the moment: what takes more must say so, and not take the machine
MOST = 16 << 30


class Hang(BaseException):
    """A command that ran for too long. Nothing that catches errors catches it."""


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    arguments: tuple[str, ...]
    status: int
    out: str
    error: str


def run(*arguments: object) -> Done:
    """A command as a shell would run it, and its contract checked. AssertionError with all that was said."""
    given = tuple(map(str, arguments))
    out, error = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    status, began = 0, time.process_time()
    with redirect_stdout(out), redirect_stderr(error), _bounded():
        try:
            cli.answer(lambda: cli.app(args=cli.spelled(list(given))))
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            status = 70
            error.write(traceback.format_exc())
    said = Done(given, status, *(stream.buffer.getvalue().decode(errors="replace") for stream in (out, error)))
    assert said.status in (0, 2), said
    assert time.process_time() - began < SECONDS, said
    check_message(said)
    return said


def check_message(done: Done) -> None:
    """One paragraph where it was refused, and no traceback anywhere."""
    assert "Traceback" not in done.error + done.out, done
    assert not {"\x1b", "\x07", "\x9b"} & set(done.error + done.out), done
    if done.status == 2 and "error:" in done.error:
        message = done.error[done.error.rindex("error:"):].strip()
        assert len(message) > len("error: ") and "\n\n" not in message and len(message) < 6000, done


@contextmanager
def _bounded() -> Iterator[None]:
    """With an alarm, and where the system has such a limit with no more memory than a small machine has."""
    def ring(*_: object) -> None:
        raise Hang(f"a command ran for {10 * SECONDS} s")
    given = {one: signal.getsignal(one) for one in SIGNALS}            # a command sets its own
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    if sys.platform == "linux":
        import resource
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MOST, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for one, handler in (given | {signal.SIGALRM: before}).items():
            signal.signal(one, handler)
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, limits)


def held(folder: Path, but: Sequence[Path] = ()) -> dict[str, tuple[int, int]]:
    """Every file under a folder with its size and time of change, without what lies in some of its folders."""
    return {path.relative_to(folder).as_posix(): ((stat := path.lstat()).st_size, stat.st_mtime_ns)
            for path in sorted(folder.rglob("*"))
            if (path.is_symlink() or not path.is_dir()) and not any(path.is_relative_to(place) for place in but)}
