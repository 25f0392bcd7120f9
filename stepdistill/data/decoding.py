"""Every picture is decoded once before training, in parallel, and what was found is remembered: training does not stop
at the thousandth hour over a file that was cut short."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import RequestError
from ..files.whole import write_whole
from .cache import default_root
from .notices import say_once

SHARE = 0.02                      # of pictures that may be unreadable
NAMED = 3


def check_count(count: int | None, found: int, where: object) -> None:
    """RequestError for a data.count beyond what is there."""
    if count is not None and count > found:
        raise RequestError(f"images: '{where}' holds {found} images, fewer than data.count, which is {count}: leave "
                           "it out for all of them.")


def readable(key: str, names: Sequence[str], decode: Callable[[int], object], where: str) -> list[int]:
    """The numbers of the pictures that can be read, of those with these names.

    key: changes with any of the files; decode(i): raises RequestError for one that cannot be read. What is skipped is
    said. RequestError where that is more than SHARE of them.
    """
    file = default_root() / "decoded" / f"{key}.json"
    broken = _remembered(file)
    if broken is None:
        broken = {names[i]: why for i, why in enumerate(_decoded(len(names), decode)) if why is not None}
        write_whole(file, json.dumps(broken).encode())
    if not broken:
        return list(range(len(names)))
    first = "; ".join(list(broken.values())[:NAMED])
    if len(broken) > SHARE * len(names):
        raise RequestError(f"images: {len(broken):,} of {len(names):,} pictures of '{where}' cannot be read, more "
                           f"than {SHARE:.0%}: {first}")
    say_once(f"images: {len(broken):,} of {len(names):,} pictures of '{where}' are skipped, since they cannot be "
             f"read: {first}")
    return [i for i, name in enumerate(names) if name not in broken]


def _decoded(count: int, decode: Callable[[int], object]) -> list[str | None]:
    """Why each picture cannot be read; None where it can. PIL decodes outside Python's lock, so that threads do."""
    def look(i: int) -> str | None:
        try:
            decode(i)
        except RequestError as error:
            return str(error)
        return None
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads:
        return list(threads.map(look, range(count), chunksize=16))


def _remembered(file: Path) -> dict[str, str] | None:
    """name -> why it cannot be read; None where nothing is remembered, or what is can't be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    well = isinstance(found, dict) and all(isinstance(why, str) for why in found.values())
    return found if well else None
