"""What entries of a recipe may be, where a plain type does not say it. ValueError with what would be right."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

SIDE, SCALE = 32_768, 1000         # at most: pixels of a side, a guidance scale
BUCKETS, MOST_BUCKETS = "buckets", 64


def under(name: str) -> Callable[[Any], Any]:
    """A plain text stands for a table with this one entry."""
    return lambda value: {name: value} if isinstance(value, str) else value


def read_resolution(value: Any) -> int | tuple[int, int] | str | dict[str, tuple[tuple[int, int], ...]]:
    """Pixels of a side, height and width, or buckets: the teacher's own, or a table that lists them."""
    if value == BUCKETS:
        return BUCKETS
    if isinstance(value, Mapping):
        return {BUCKETS: _read_buckets(value)}
    return _read_size(value)


def size_of(resolution: Any) -> int | tuple[int, int] | None:
    """What a teacher is loaded for: of buckets that a recipe lists the first, none where they are the teacher's own."""
    if isinstance(resolution, Mapping):
        return resolution[BUCKETS][0]
    return None if resolution == BUCKETS else resolution


def buckets_of(resolution: Any) -> tuple[tuple[int, int], ...] | None:
    """Height and width of each bucket that a recipe lists, () where they are to be the teacher's own; None without
    buckets."""
    if isinstance(resolution, Mapping):
        return resolution[BUCKETS]
    return () if resolution == BUCKETS else None


def _read_buckets(value: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    sizes = value[BUCKETS] if value.keys() == {BUCKETS} else None
    if (not isinstance(sizes, list | tuple) or not 2 <= len(sizes) <= MOST_BUCKETS
        or not all(isinstance(size, list | tuple) for size in sizes)):
        raise ValueError(f"should be {{buckets: [[1024, 1024], [832, 1216]]}}, 2 to {MOST_BUCKETS} sizes, each "
                         "[height, width], the usual one first; or the word buckets, for those of the "
                         "teacher's own area")
    found = tuple(map(_read_size, sizes))
    if len({*found}) < len(found):
        raise ValueError("should name each size once")
    return found


def _read_size(value: Any) -> int | tuple[int, int]:
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= SIDE
                                  for side in sides):
        raise ValueError(f"should be pixels, of a side at most {SIDE}: 768, [height, width] such as [832, 1216], "
                         "or buckets")
    return tuple(sides) if isinstance(value, list | tuple) else value


def read_guidance(value: Any) -> float | tuple[float, float]:
    scales = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(w, bool) or not isinstance(w, int | float) for w in scales) or len(scales) not in (1, 2):
        raise ValueError("should be one scale such as 3.0, or a range such as [2.0, 5.0]")
    if not all(map(math.isfinite, scales)):
        raise ValueError("should be a finite number, or a range of two")
    if min(scales) < 1 or max(scales) > SCALE or list(scales) != sorted(scales):
        raise ValueError(f"should be scales of at least 1 (1 is no guidance) and at most {SCALE}, a range from "
                         "low to high")
    return (float(scales[0]), float(scales[1])) if len(scales) == 2 else float(scales[0])


def read_prompts(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise ValueError("should be shapes, a .txt file of one prompt a line, a list of prompts, or none")
