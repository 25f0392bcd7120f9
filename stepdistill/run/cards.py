"""What a card must have for a recipe, asked before anything is loaded, and which switches make a recipe smaller."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import RequestError
from ..recipe import Recipe
from .checks import family
from .plan import plan

GB, ROOM = 1e9, 1.15                  # a forecast may be this far above what a training takes


def check_card(recipe: Recipe, device: torch.device) -> None:
    """RequestError, with the recipe's line, for a card that lacks the precision or the memory for one of its stages.

    The memory is the forecast of `stepdistill plan` against all that the card has; on a CPU nothing is asked.
    """
    if device.type != "cuda":
        return
    card = torch.cuda.get_device_properties(device)
    for stage in recipe.stages:
        check_precision(stage, card)
    if family(recipe).no_pipeline:             # of Toy there is nothing to plan
        return
    forecast = plan(recipe)
    for stage, row in zip(recipe.stages, forecast.get("stages", [forecast]), strict=True):
        check_memory(stage, row["peak"], card)


def check_precision(recipe: Recipe, card: torch._C._CudaDeviceProperties) -> None:
    if recipe.train.precision == "bf16" and (card.major, card.minor) < (8, 0):
        raise recipe.refuse("train.precision",
                            f"is bf16, which a {card.name} lacks (compute capability {card.major}.{card.minor}, and "
                            "bfloat16 begins with 8.0): take fp16, which it has, or fp32")


def check_memory(recipe: Recipe, peak: float, card: torch._C._CudaDeviceProperties) -> None:
    """peak: the forecast, in bytes."""
    if peak <= ROOM * card.total_memory:
        return
    tried, least = [], peak
    for name, value, smaller in switches(recipe):
        tried.append(f"{name}: {value}")
        least = plan(smaller)["peak"]
        if least <= card.total_memory:
            outcome = f"With {', '.join(tried)} the peak is about {least / GB:.1f} GB"
            break
    else:
        outcome = f"Even with {', '.join(tried)} the peak is about {least / GB:.1f} GB" if tried else "No switch is left"
        outcome += ": take a larger card or a smaller teacher"
    raise RequestError(f"{recipe.name} takes about {peak / GB:.1f} GB at its peak, and the {card.name} has "
                       f"{card.total_memory / GB:.1f} GB. {outcome}. `stepdistill plan {recipe.arguments}` shows what "
                       "it is made of")


def switches(recipe: Recipe) -> Iterator[tuple[str, object, Recipe]]:
    """(entry, value, recipe with it and those before): what makes a training smaller, cheapest first, as far as it is
    not on yet."""
    plain = recipe.resolved()
    train, batch = plain["train"], plain["data"]["batch"]
    half = "bf16" if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    for name, value, on in (("precision", half, train["precision"] != "fp32"),
                            ("gradient_checkpointing", True, train["gradient_checkpointing"]),
                            ("accumulate", batch, train["accumulate"] == batch)):
        if not on:
            train[name] = value
            yield f"train.{name}", str(value).lower(), Recipe.load(plain)
    for role in ("student", "critic"):
        if plain[role] is not None and (plain[role] == "full" or plain[role]["lora"] is None):
            plain[role] = {"lora": {"rank": 32}}
            yield role, "{lora: {rank: 32}}", Recipe.load(plain)


def advice(recipe: Recipe) -> str:
    """A sentence for a training that ran out of memory."""
    left = [f"{name}: {value}" for name, value, _ in switches(recipe)]
    return f"What helps, cheapest first: {', '.join(left)}." if left else "Every switch is on already: take a larger card or a smaller teacher."
