"""How the student of a recipe is sampled, in words of the mathematics."""
from __future__ import annotations

from ..diffusion.schedule import Schedule
from ..methods import load_method
from ..methods.base import Inference
from ..recipe.schema import Recipe


def inference_of(recipe: Recipe, schedule: Schedule, steps: int | None = None) -> Inference:
    """In the recipe's number of steps unless given. Of a method that goes on with any student (`as_before`), as its
    stage before samples it. ValueError for what the settings do not serve."""
    said = recipe
    while said.previous is not None and load_method(said.method).as_before:
        said = said.previous
    steps = recipe.steps if steps is None else steps
    return load_method(said.method).inference(said.method_settings(), steps, schedule, said.guidance)
