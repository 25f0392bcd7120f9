"""What a recipe's discriminator reads: features that there are, of a network that there is, or a refusal with the recipe's line."""
from __future__ import annotations

from collections.abc import Mapping

from . import resources
from .models.discriminator import Shape, chosen
from .models.teacher import family_at
from .models.vision import PlaneSight, Sight
from .recipe import Recipe


def judge(recipe: Recipe) -> Sight | PlaneSight:
    """The network whose features of samples a discriminator reads, before its weights are."""
    name = None if recipe.discriminator is None else recipe.discriminator.network
    with recipe.blaming("discriminator.network", "cannot be used"):
        family = family_at(resources.pipeline(recipe.teacher), recipe.revision)
        return family.vision(None if name is None else str(resources.locate(name) or name))


def judged(recipe: Recipe) -> dict[str, Shape]:
    """What a discriminator reads of its `judge`."""
    seen = judge(recipe)
    with recipe.blaming("discriminator.features", "cannot be read"):
        return seen.read(None if recipe.discriminator is None else recipe.discriminator.features)


def tapped(recipe: Recipe, shapes: Mapping[str, Shape], usual: tuple[str, ...]) -> dict[str, Shape]:
    """What a discriminator reads of a network of the teacher's kind, whose features and usual ones these are."""
    said = None if recipe.discriminator is None else recipe.discriminator.features
    with recipe.blaming("discriminator.features", "cannot be read"):
        return chosen(shapes, usual if said is None else said)
