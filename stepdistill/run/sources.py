"""The teacher of a recipe as models read it, and what plugins bring to a recipe."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import resources
from ..data import sources as data
from ..errors import RequestError
from ..evaluation.metrics import METRICS
from ..models.families import FAMILIES
from ..models.sources import FusedLora, Source
from ..recipe import Recipe, plugins
from ..recipe.messages import unknown

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
    """With absolute paths for what lies here or ships. RequestError for a base that can only be a folder and is
    none."""
    return _with_paths(replace(source, base=resources.pipeline(source.base)),
                       lambda name: str(resources.locate(name) or name))


def base_of(run: Run) -> Source:
    """What users call a run's teacher: with paths that hold from any folder, what ships by its name, and the variant
    that was found."""
    source = replace(named(run.recipe), variant=run.teacher.source.variant)
    return _with_paths(replace(source, base=resources.portable(source.base)), resources.portable)


def bring_family(pipeline: str, folder: plugins.Folder | None) -> None:
    """Has the family of a pipeline class registered, if a plugin has it."""
    plugins.load("families", pipeline, FAMILIES, folder)


def is_outside(recipe: Recipe, path: str, name: object) -> bool:
    """Whether the images or prompts at this entry are a plugin's, which then is registered. RequestError for a name
    that is also a file or a folder."""
    if not isinstance(name, str) or name in data.OWN or not name.isidentifier():
        return False
    with recipe.blaming(path, f"is {name}, of a plugin"):
        plugins.load("data", name, data.SOURCES, recipe.plugged)
    if name in data.SOURCES and (found := resources.locate(name)) is not None:
        raise recipe.refuse(path, f"is {name}, which a plugin has and {found} is too: name the file as ./{name}, "
                            "or the plugin otherwise")
    return name in data.SOURCES


def marked(metrics: Sequence[str], folder: plugins.Folder | None) -> dict[str, str]:
    """Name -> what changes with its code, of metrics that plugins have. RequestError for one that none has."""
    for name in metrics:
        plugins.load("metrics", name, METRICS, folder)
        if name not in METRICS:
            raise RequestError(f"the metric {name} " + unknown(name, [*METRICS, *plugins.names("metrics", folder)],
                                                               "metric of a plugin"))
    return {name: plugins.mark_of("metrics", name) or "registered in this process" for name in metrics}


def _with_paths(source: Source, path: Callable[[str], str]) -> Source:
    given = {name: path(value) for name in ("config", "vae", "scheduler") if (value := vars(source)[name]) is not None}
    return replace(source, **given, loras=tuple(replace(lora, path=path(lora.path)) for lora in source.loras))
