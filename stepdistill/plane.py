"""What a teacher's family does not serve is refused before anything is loaded, and so are data of another kind than its samples."""
from __future__ import annotations

from . import resources
from .data.toy import is_toy
from .models.teacher import family_at
from .recipe import Recipe


def check_plane(recipe: Recipe) -> None:
    """RequestError, with the recipe's line, for entries that the teacher's family does not serve."""
    with recipe.blaming("teacher", "cannot be loaded"):
        family = family_at(resources.pipeline(recipe.teacher), recipe.revision)
    points, (path, data) = family.samples == "points", _data(recipe)
    if points and not _are_points(data):
        raise recipe.refuse(path, f"is {data}, but the teacher is Toy, whose samples are points of the plane: give its own folder, "
                            f"{recipe.teacher}")
    if not points and _are_points(data):
        raise recipe.refuse(path, f"is {data}, a folder of Toy, whose samples are points of the plane, but the teacher {recipe.teacher} "
                            f"is none: give shapes, or {path.rsplit('.', 1)[-1]} of your own")
    for entry, reason in family.unserved.items():
        if (value := _at(recipe, entry)) not in (None, False):
            raise recipe.refuse(entry, f"is {'on' if value is True else value}, but {reason}")


def _at(recipe: Recipe, entry: str) -> object:
    found: object = recipe
    for name in entry.split("."):
        found = None if found is None else getattr(found, name)
    return found


def _data(recipe: Recipe) -> tuple[str, str | tuple[str, ...]]:
    """Where the recipe names its images or prompts, and which."""
    data = recipe.data
    if data.made is not None:
        return f"data.{data.kind}.prompts", data.made.prompts
    return f"data.{data.kind}", data.images or data.prompts


def _are_points(data: str | tuple[str, ...]) -> bool:
    return isinstance(data, str) and (found := resources.locate(data)) is not None and is_toy(found)
