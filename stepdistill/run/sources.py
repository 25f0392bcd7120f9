"""The teacher of a recipe as models read it, and what plugins bring to a recipe."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .. import resources
from ..data import sources as data
from ..data.shapes import SLOTS, attributes_of
from ..errors import RequestError
from ..evaluation.metrics import METRICS, Metric
from ..models.families import FAMILIES
from ..models.rewards import REWARDS, Reward, load_reward
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
    parts = teacher.model_dump(exclude={"loras", "components_to_quantize"})
    parts["components_to_quantize"] = teacher.components_to_quantize and tuple(teacher.components_to_quantize)
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


def marked(metrics: Sequence[str], folder: plugins.Folder | None, device: str | torch.device = "cpu") -> dict[str, str]:
    """Name -> what changes with its code or weights, of metrics: a reward, by NAME or NAME=FOLDER, or one that a plugin
    has, by name.

    RequestError for others, and for a reward whose weights cannot be had.
    """
    marks: dict[str, str] = {}
    for asked in metrics:
        name, given, _ = asked.partition("=")
        if name in REWARDS:
            reward = reward_of(asked, device)
            METRICS[name] = Metric(reward, prompts=True)
            marks[name] = f"sha256 {reward.id}, licence of the weights: {REWARDS[name].licence}"
            continue
        plugins.load("metrics", name, METRICS, folder)
        if name not in METRICS:
            known = [*METRICS, *REWARDS, *plugins.names("metrics", folder)]
            raise RequestError(f"the metric {name} " + unknown(name, known, "metric"))
        if given:
            raise RequestError(f"the metric {asked} is a plugin's, which takes no weights: name it {name}")
        marks[name] = plugins.mark_of("metrics", name) or "registered in this process"
    return marks


def reward_of(asked: str, device: str | torch.device = "cpu") -> Reward:
    """A reward by NAME or NAME=PLACE, as `load_reward`."""
    return load_reward(asked, SLOTS, attributes_of, device)


def _with_paths(source: Source, path: Callable[[str], str]) -> Source:
    given = {name: path(value) for name in ("config", "vae", "scheduler") if (value := vars(source)[name]) is not None}
    return replace(source, **given, loras=tuple(replace(lora, path=path(lora.path)) for lora in source.loras))
