"""Every picture is decoded once before training, in parallel, and what was found is remembered: training does not stop
at the thousandth hour over a file that was cut short."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

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


def readable(key: str, names: Sequence[str], decode: Callable[[int], Tensor], where: str) -> dict[int, tuple[int, int]]:
    """The numbers of the pictures that can be read, of those with these names, each with its height and width.

    key: changes with any of the files; decode(i): its pixels (..., H, W), or RequestError for one that cannot be read.
    What is skipped is said. RequestError where that is more than SHARE of them.
    """
    file = default_root() / "decoded" / f"{key}.json"
    found = _remembered(file, len(names))
    if found is None:
        found = _decoded(len(names), decode)
        write_whole(file, json.dumps(found).encode())
    kept = {i: (seen[0], seen[1]) for i, seen in enumerate(found) if not isinstance(seen, str)}
    broken = {names[i]: why for i, why in enumerate(found) if isinstance(why, str)}
    if not broken:
        return kept
    first = "; ".join(list(broken.values())[:NAMED])
    if len(broken) > SHARE * len(names):
        raise RequestError(f"images: {len(broken):,} of {len(names):,} pictures of '{where}' cannot be read, more "
                           f"than {SHARE:.0%}: {first}")
    say_once(f"images: {len(broken):,} of {len(names):,} pictures of '{where}' are skipped, since they cannot be "
             f"read: {first}")
    return kept


def _decoded(count: int, decode: Callable[[int], Tensor]) -> list[str | list[int]]:
    """Each picture's height and width, or why it cannot be read. PIL decodes outside Python's lock, so that threads
    do."""
    def look(i: int) -> str | list[int]:
        try:
            return list(decode(i).shape[-2:])
        except RequestError as error:
            return str(error)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads:
        return list(threads.map(look, range(count), chunksize=16))


def _remembered(file: Path, count: int) -> list[str | list[int]] | None:
    """As `_decoded`; None where nothing is remembered, or what is can't be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    well = isinstance(found, list) and len(found) == count and all(isinstance(seen, str) or _is_sides(seen)
                                                                   for seen in found)
    return found if well else None


def _is_sides(seen: object) -> bool:
    return isinstance(seen, list) and len(seen) == 2 and all(isinstance(side, int) for side in seen)
