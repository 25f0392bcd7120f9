"""How a training ends before its time, and ends well."""
from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")          # Ctrl-C; schedulers and containers; a terminal that is closed
SIGNALS = tuple(getattr(signal, name) for name in NAMES if name in dir(signal))     # Windows has no SIGHUP


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether the process was asked to end: by Ctrl-C, SIGTERM or SIGHUP. They only raise
    the flag; Ctrl-C for the second time stops at once. A signal that was ignored before, as nohup has it, stays so.

    Outside the main thread, where Python delivers no signals, the flag stays down.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False
    previous = {one: signal.getsignal(one) for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN}

    def first(*_: object) -> None:
        nonlocal asked
        asked = True
        if signal.SIGINT in previous:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for one in previous:
        signal.signal(one, first)
    try:
        yield lambda: asked
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
