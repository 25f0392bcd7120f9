"""A student that keeps its guidance, so that a negative prompt acts on it: at which scale, and where that cannot be."""
from __future__ import annotations

import inspect
from collections.abc import Mapping

import diffusers
import torch

from .. import resources
from ..data.prompts import Captions, open_prompts
from ..diffusion.contracts import Role
from ..diffusion.guidance import guided
from ..errors import RequestError
from ..methods.base import FIXED, Follows, Frozen, Need
from ..models.sources import class_at
from ..recipe import Recipe
from .sources import source_of


def kept_scale(recipe: Recipe) -> float | None:
    """The scale at which the student is guided, in training and in a call; None for one that has its guidance
    within."""
    if recipe.negatives is None:
        return None
    return float(recipe.guidance if recipe.negatives.scale is None else recipe.negatives.scale)


def negative_prompts(recipe: Recipe) -> Captions:
    """What a student that keeps its guidance learns to be drawn away from. RequestError for what cannot be read."""
    named = recipe.negatives.prompts
    with recipe.blaming("negatives.prompts", f"is {named}" if isinstance(named, str) else "cannot be read"):
        if named == "none":
            raise RequestError("give texts in brackets, a .txt file of one a line, or shapes")
        return open_prompts(str(resources.locate(named) or named) if isinstance(named, str) else list(named),
                            recipe.train.seed)


def example(recipe: Recipe) -> str | None:
    """The first of them; None of a student that has its guidance within."""
    return None if recipe.negatives is None else negative_prompts(recipe).captions(torch.zeros(1, dtype=torch.int64))[0]


def keeping(roles: Mapping[str, Role], needs: Mapping[str, Need], scale: float | None) -> Mapping[str, Role]:
    """The roles as a method sees them: a student that keeps its guidance, and what follows it, are their own guided
    predictions, away from what the teacher is guided away from. Whatever a method matches to its teacher's prediction
    then is the student's guided one."""
    if scale is None:
        return roles
    own = [name for name, need in needs.items() if name == "student" or isinstance(need, Follows)]
    return {**roles, **{name: guided(roles[name], scale) for name in own}}


def check_negatives(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    """RequestError where no negative prompt could act on the student: nothing is loaded but configs."""
    if recipe.negatives is None:
        return
    _check_scale(recipe)
    _check_method(recipe, needs)
    _check_pipeline(recipe)
    negative_prompts(recipe)


def check_unread(recipe: Recipe) -> None:
    """RequestError for a teacher whose network reads its guidance scale by itself: no call of its pipeline guides it
    twice."""
    if recipe.negatives is not None:
        raise recipe.refuse("negatives", "are given, but the teacher's network reads its guidance scale by itself, "
                                         "in one evaluation that no negative prompt enters: leave them out")


def _check_scale(recipe: Recipe) -> None:
    if isinstance(recipe.guidance, tuple):
        raise recipe.refuse("guidance", f"is {list(recipe.guidance)}, but a student that keeps its guidance, as "
                                        "negatives ask for, is trained at one scale: give one, such as guidance: 2.5")
    if recipe.guidance <= 1:
        raise recipe.refuse("guidance", f"is {recipe.guidance:g}, at which a teacher reads no negative prompt, "
                                        "and negatives are given: give a scale above 1, such as guidance: 2.5")


def _check_method(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    student = needs["student"]
    if "w" in student.reads:
        raise recipe.refuse("negatives", "are given, but the student reads its guidance scale, and stock pipelines "
                                         "switch guidance off where the network reads one: let "
                                         "guidance_embedding be false")
    if not needs.get("teacher", Frozen()).within:
        raise recipe.refuse("negatives", f"are given, but a student of {recipe.method} is guided by its pipeline "
                                         "already: leave them out")
    others = [name for name, need in needs.items() if name != "student" and not isinstance(need, FIXED + (Follows,))]
    if others:
        raise recipe.refuse("negatives", f"are given, but the {' and the '.join(others)} of {recipe.method} would "
                                         "be trained on samples that depend on a negative prompt which it is not "
                                         "told: take a method that trains the student alone, such as lcm")
    if recipe.data.pairs is not None:
        raise recipe.refuse("negatives", "are given, but data.pairs are ways that the teacher took without them: "
                            "give images, samples or prompts")
    if recipe.taught_by_previous:
        raise recipe.refuse("negatives", "are given, but the teacher of this stage is the student of the one before, "
                                         "whose guidance is not asked for again: leave teacher: previous out")


def _check_pipeline(recipe: Recipe) -> None:
    kind = class_at(source_of(recipe))
    cls = getattr(diffusers, kind) if kind in dir(diffusers) else None
    if cls is None or "negative_prompt" not in inspect.signature(cls.__call__).parameters:
        raise recipe.refuse("negatives", f"are given, but a call of a {kind} takes no negative_prompt: leave them out")
