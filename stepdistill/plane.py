"""Recipes on Toy, whose samples are points of the plane: what is there for pictures alone is refused before anything is loaded."""
from __future__ import annotations

from . import resources
from .data.toy import is_toy
from .recipe import Recipe


def on_toy(recipe: Recipe) -> bool:
    return is_toy(resources.pipeline(recipe.teacher))


def check_plane(recipe: Recipe) -> None:
    """RequestError, with the recipe's line, for what Toy has not, and for data of another kind than the teacher's."""
    toy = on_toy(recipe)
    path, data = _data(recipe)
    if toy and not _is_toy_folder(data):
        raise recipe.refuse(path, f"is {data}, but the teacher is Toy, whose samples are points of the plane: give its own folder, "
                            f"{recipe.teacher}")
    if not toy and _is_toy_folder(data):
        raise recipe.refuse(path, f"is {data}, a folder of Toy, whose samples are points of the plane, but the teacher {recipe.teacher} "
                            f"is none: give shapes, or {path.rsplit('.', 1)[-1]} of your own")
    if not toy:
        return
    if recipe.evaluate.reference is not None:
        raise recipe.refuse("evaluate.reference", f"is {recipe.evaluate.reference}, but figures are of pictures, and the teacher is Toy, "
                            f"whose samples are points of the plane: leave it out, and `stepdistill verify {recipe.method}` measures them")
    if recipe.train.gradient_checkpointing:
        raise recipe.refuse("train.gradient_checkpointing", "is on, but the teacher is Toy, whose network has no blocks to compute again: "
                            "leave it off")
    if recipe.train.attention not in ("auto", "sdpa"):
        raise recipe.refuse("train.attention", f"is {recipe.train.attention}, but the teacher is Toy, whose network has no attention: "
                            "leave it out")
    if recipe.discriminator is not None and recipe.discriminator.network is not None:
        raise recipe.refuse("discriminator.network", f"is {recipe.discriminator.network}, which judges pictures, but the teacher is Toy, "
                            "whose samples are points of the plane with features of their own: leave it out")


def _data(recipe: Recipe) -> tuple[str, str | tuple[str, ...]]:
    """Where the recipe names its images or prompts, and which."""
    data = recipe.data
    if data.made is not None:
        return f"data.{data.kind}.prompts", data.made.prompts
    return f"data.{data.kind}", data.images or data.prompts


def _is_toy_folder(data: str | tuple[str, ...]) -> bool:
    return isinstance(data, str) and (found := resources.locate(data)) is not None and is_toy(found)
