"""The reward that a method raises: which one a recipe means, and whether it can be had."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .. import resources
from ..data.shapes import attributes_of
from ..methods.base import Need, Reward
from ..models.rewards import PlannedReward, find_reward, where
from ..recipe.schema import Recipe
from .sources import reward_of, source_of
from .teacher_checks import data_of, family

OWN = "shapes_reward"                                 # the one that ships, of captions of Shapes


def wanted(needs: Mapping[str, Need]) -> bool:
    return any(isinstance(need, Reward) for need in needs.values())


def reward_name(recipe: Recipe) -> str:
    """NAME or NAME=PLACE, with the place as it is found from here; on Shapes its own unless named. RequestError where
    nothing says which."""
    if recipe.reward is not None:
        name, _, place = recipe.reward.partition("=")
        return f"{name}={resources.locate(place) or place}" if place else name
    if data_of(recipe)[1] == "shapes":
        return OWN
    raise recipe.refuse("method", f"is {recipe.method}, which raises a reward, and nothing says which: name one, such "
                        "as reward: pickscore, which is a download, or reward: hpsv2=FOLDER with the weights of a "
                        "CLIPModel")


def check_reward(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    """RequestError for a reward that cannot be had, that its prompts do not suit, or that nothing reads: no weights are
    read."""
    if not wanted(needs):
        if recipe.reward is not None:
            raise recipe.refuse("reward", f"is {recipe.reward}, but {recipe.method} raises none: leave it out, or let "
                                "it be of a stage whose method is reward")
        return
    if recipe.data.caption_dropout:
        raise recipe.refuse("data.caption_dropout", f"is {recipe.data.caption_dropout:g}, but a reward scores each "
                            "picture by its caption: leave it out")
    if recipe.previous is not None and vars(recipe.method_settings()).get("fresh"):
        raise recipe.refuse("settings.fresh", "is on, but the student is sampled as that of the stage before, "
                            f"{recipe.previous.method}: leave it out")
    if family(recipe).reward is not None:
        return
    with recipe.blaming("reward", f"is {(name := reward_name(recipe))}, which cannot be raised"):
        find_reward(name)
    path, texts = data_of(recipe)
    if where(name)[0] == OWN and texts != "shapes" and (
            isinstance(texts, str) or any(attributes_of(text) is None for text in texts)):
        raise recipe.refuse("reward", f"is {name}, which scores captions of Shapes alone, but {path} are "
                            "others: name another, such as pickscore")


def judge_of(recipe: Recipe, needs: Mapping[str, Need], device: torch.device) -> nn.Module | None:
    """The reward of a recipe whose method raises one, on the meta device without weights."""
    if not wanted(needs):
        return None
    if (own := family(recipe).reward) is not None:
        return own(source_of(recipe).place)
    with recipe.blaming("reward", f"is {(name := reward_name(recipe))}, which cannot be loaded"):
        return PlannedReward(find_reward(name)) if device.type == "meta" else reward_of(name, device)
