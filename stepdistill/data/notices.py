"""What is said of data, once in a process: a source is opened several times on the way to the first update."""
from __future__ import annotations

import logging

log = logging.getLogger("stepdistill")
_said: set[str] = set()


def say_once(text: str, kind: str | None = None) -> None:
    """kind: of several texts of one kind only the first is said."""
    if (kind or text) not in _said:
        _said.add(kind or text)
        log.info(text)
