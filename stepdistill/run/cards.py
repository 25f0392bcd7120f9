"""What a card must have for a recipe, asked before anything is loaded, and which switches make a recipe smaller."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RequestError
from ..recipe import Recipe
from .plan import plan
from .teacher_checks import family

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
    found = fit(recipe, peak, card.total_memory)
    changed = ", ".join(f"{name}: {value}" for name, value in found.switches.items())
    outcome = f"With {changed} the peak is about {found.peak / GB:.1f} GB"
    if not found.fits:
        outcome = f"Even with {changed} the peak is about {found.peak / GB:.1f} GB" if changed else "No switch is left"
        outcome += ": take a larger card or a smaller teacher"
    raise RequestError(f"{recipe.name} takes about {peak / GB:.1f} GB at its peak, and the {card.name} has "
                       f"{card.total_memory / GB:.1f} GB. {outcome}. `stepdistill plan {recipe.arguments}` shows what "
                       "it is made of")


@dataclass(frozen=True)
class Fit:
    """How a training is made to fit. switches: entry -> value, those that it takes, or all where none of them is
    enough; peak: the forecast with them, in bytes."""

    switches: dict[str, str]
    peak: float
    fits: bool


def fit(recipe: Recipe, peak: float, memory: float) -> Fit:
    """The first switches, cheapest first, with which the forecast is at most `memory` bytes. peak: the forecast
    without."""
    tried: dict[str, str] = {}
    if peak <= memory:
        return Fit(tried, peak, True)
    for name, value, smaller in switches(recipe):
        tried[name] = str(value)
        peak = plan(smaller)["peak"]
        if peak <= memory:
            return Fit(tried, peak, True)
    return Fit(tried, peak, False)


def fit_stage(recipe: Recipe, forecast: Mapping[str, Any], memory: float) -> Fit:
    """As `fit`, of the stage that takes most. forecast: the plan of the whole recipe."""
    stages = forecast.get("stages", [forecast])
    peak, stage = max(((row["peak"], i) for i, row in enumerate(stages)))
    return fit(recipe.stages[stage], peak, memory)


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
        if plain[role] == "full" or isinstance(plain[role], dict) and plain[role]["lora"] is None:
            plain[role] = {"lora": {"rank": 32}}
            yield role, "{lora: {rank: 32}}", Recipe.load(plain)


def advice(recipe: Recipe) -> str:
    """A sentence for a training that ran out of memory."""
    left = [f"{name}: {value}" for name, value, _ in switches(recipe)]
    return (f"What helps, cheapest first: {', '.join(left)}." if left else "Every switch is on already: take a "
            "larger card or a smaller teacher.")
