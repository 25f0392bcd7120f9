"""stepdistill turns a diffusers pipeline into a 1-8 step generator that stock diffusers loads."""
from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import RequestError

if TYPE_CHECKING:
    from .api import bench, export, extract, load, pairs, plan, sample, train
    from .proofs.run import verify

__version__ = "0.1.0"
__all__ = ["RequestError", "bench", "export", "extract", "load", "pairs", "plan", "sample", "train", "verify"]


class _Export(ModuleType):
    """The package `stepdistill.export`, which can be called: stepdistill.export(run, to="lora")."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return import_module(".api", "stepdistill").export(*args, **options)


class _Face(ModuleType):
    """This package. The functions arrive with torch and diffusers, hence on first use."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'stepdistill' has no attribute {name!r}; it has {', '.join(__all__)}")
        place = import_module(".proofs.run" if name == "verify" else ".api", "stepdistill")
        return vars(self)[name] if name in vars(self) else vars(place)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system hands over the package of that name
        if name == "export" and isinstance(value, ModuleType):
            value.__class__ = _Export
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Face
