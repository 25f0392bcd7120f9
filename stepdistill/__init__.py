"""stepdistill turns a diffusers pipeline into a 1-8 step generator that stock diffusers loads."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import RequestError

if TYPE_CHECKING:
    from .build import bench, export, load, sample, train

__version__ = "0.1.0"
__all__ = ["RequestError", "bench", "export", "load", "sample", "train"]


def __getattr__(name: str) -> Any:
    """The working functions arrive with torch and diffusers, hence on first use."""
    if name in __all__:
        from . import build
        return vars(build)[name]
    raise AttributeError(f"module 'stepdistill' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
