"""The teacher of a recipe as models read it."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import resources
from ..models.sources import FusedLora, Source
from ..recipe import Recipe

if TYPE_CHECKING:
    from .setup import Run


def source_of(recipe: Recipe) -> Source:
    """As it is loaded: paths are absolute."""
    return located(named(recipe))


def named(recipe: Recipe) -> Source:
    """As the recipe names it."""
    teacher = recipe.teacher
    parts = teacher.model_dump(exclude={"loras"})
    guided = {"negative_prompt": recipe.negative_prompt, "guidance_rescale": recipe.guidance_rescale}
    return Source(**parts, **guided, loras=tuple(FusedLora(lora.path, lora.weight) for lora in teacher.loras))


def located(source: Source) -> Source:
    """With absolute paths for what lies here or ships. RequestError for a base that can only be a folder and is none."""
    return _with_paths(replace(source, base=resources.pipeline(source.base)), lambda name: str(resources.locate(name) or name))


def base_of(run: Run) -> Source:
    """What users call a run's teacher: with paths that hold from any folder, what ships by its name, and the variant that was found."""
    source = replace(named(run.recipe), variant=run.teacher.source.variant)
    return _with_paths(replace(source, base=resources.portable(source.base)), resources.portable)


def _with_paths(source: Source, path: Callable[[str], str]) -> Source:
    given = {name: path(value) for name in ("config", "vae", "scheduler") if (value := vars(source)[name]) is not None}
    return replace(source, **given, loras=tuple(replace(lora, path=path(lora.path)) for lora in source.loras))
