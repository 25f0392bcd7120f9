"""stepdistill turns a diffusers pipeline into a 1-8 step generator that stock diffusers loads."""
from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from .errors import RequestError

if TYPE_CHECKING:
    from .api import bench, check, doctor, export, extract, load, pairs, plan, sample, train, undistil, with_teacher
    from .data.sources import register_data
    from .evaluation.metrics import register_metric
    from .methods import register_method
    from .models.families import register_family
    from .proofs.run import verify
    from .recipe.catalogue import methods, recipes

__version__ = "0.1.0"
__all__ = ["RequestError", "bench", "check", "doctor", "export", "extract", "load", "methods", "pairs", "plan",
           "recipes", "register_data", "register_family", "register_method", "register_metric", "sample", "train",
           "undistil", "verify", "with_teacher"]
# others are api's
ELSEWHERE = {"verify": ".proofs.run", "methods": ".recipe.catalogue", "recipes": ".recipe.catalogue",
             "register_data": ".data.sources", "register_family": ".models.families", "register_method": ".methods",
             "register_metric": ".evaluation.metrics"}


class _Export(ModuleType):
    """The package `stepdistill.export`, which can be called: stepdistill.export(run, to="lora")."""

    def __call__(self, run: str | Path, to: str = "lora", guidance: float | None = None, out: str | Path | None = None,
                 dtype: str | None = None, *, checkpoint: int | None = None,
                 weights: Literal["ema", "student"] | None = None, push: str | None = None,
                 public: bool = False) -> Path:
        return import_module(".api", "stepdistill").export(run, to, guidance, out, dtype, checkpoint=checkpoint,
                                                           weights=weights, push=push, public=public)


class _Methods(ModuleType):
    """The package `stepdistill.methods`, which can be called: stepdistill.methods(), stepdistill.methods("lcm")."""

    def __call__(self, name: str | None = None, plugins: str | Path | None = None) -> list[dict[str, Any]]:
        return import_module(".recipe.catalogue", "stepdistill").methods(name, plugins)


CALLED: dict[str, type[ModuleType]] = {"export": _Export, "methods": _Methods}


class _Face(ModuleType):
    """This package. The functions arrive with torch and diffusers, hence on first use."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'stepdistill' has no attribute {name!r}; it has {', '.join(__all__)}")
        if name in CALLED:
            return import_module(f".{name}", "stepdistill")
        place = import_module(ELSEWHERE.get(name, ".api"), "stepdistill")
        return vars(self)[name] if name in vars(self) else vars(place)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system hands over the packages of those names
        if name in CALLED and isinstance(value, ModuleType):
            value.__class__ = CALLED[name]
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Face
