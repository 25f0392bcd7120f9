"""What a run may be asked for when it goes on, beside what it was begun with."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import parallel
from ..data.cache import flat
from ..errors import RequestError
from ..files.whole import write_whole
from ..recipe import Recipe
from ..recipe.yaml import Source
from ..training import checkpoints
from .pinning import as_begun

RECIPE, CHANGES, STAGES = "recipe.yaml", "changes.jsonl", "stages"
FREE = ("train.updates", "train.lr", "train.clip", "train.precision", "train.checkpoint_every", "train.keep",
        "train.log_every", "train.trackers",
        "train.doctor", "train.doctor_every", "train.gradient_checkpointing", "critic.lr", "discriminator.lr",
        "evaluate", "plugins.folder")
"""Entries that hold from the next step on, and of which nothing that is saved depends."""


def resumed(run: Path, recipe: Recipe) -> Recipe:
    """The recipe to go on with: as asked, on the commits of its teacher that the run was begun on.

    RequestError for a change of an entry that is not FREE, and for a number of updates that the run cannot have. A
    folder of plugins may lie elsewhere now, with the same files.
    """
    begun = _begun(run, recipe)
    recipe = as_begun(recipe, begun)
    changed = changes(begun, recipe)
    if fixed := [f"{key} was {was!r}, now {now!r}" for key, (was, now) in changed.items() if not _is_free(key)]:
        raise RequestError(f"{run} was begun with another recipe: {'; '.join(fixed)}. Resume with {run / RECIPE}, "
                           f"or begin a new run with another --out. What may change on the way is {', '.join(FREE)}")
    if counts := {key: values for key, values in changed.items() if key.endswith("train.updates")}:
        _check_updates(run, begun, recipe, counts)
    return recipe


def changes(begun: Recipe, asked: Recipe) -> dict[str, tuple[Any, Any]]:
    """Entry -> what it was, what it is to be, where they differ."""
    was, now = (flat(_numbered(recipe.resolved())) for recipe in (begun, asked))
    return {key: (was.get(key), now.get(key)) for key in was | now if was.get(key) != now.get(key)}


def write_down(run: Path, recipe: Recipe) -> None:
    """The recipe that a run goes on with, in place of the one before, and a line a change in changes.jsonl."""
    if parallel.rank() or not (changed := changes(_begun(run, recipe), recipe)):
        return
    path, saved = run / CHANGES, checkpoints.latest(run)
    step = 0 if saved is None else checkpoints.step_of(saved)
    lines = "".join(json.dumps({"step": step, "entry": key, "was": was, "now": now}) + "\n"
                    for key, (was, now) in changed.items())
    write_whole(path, (path.read_bytes() if path.is_file() else b"") + lines.encode())
    write_whole(run / RECIPE, recipe.dump().encode())


def _begun(run: Path, recipe: Recipe) -> Recipe:
    """The recipe that a run was begun with, with its plugins where they lie now."""
    had = Source.of_file(run / RECIPE).values.get("plugins") is not None
    return Recipe.load(run / RECIPE, {"plugins.folder": recipe.plugins.folder} if had and recipe.plugins is not None
                       else {})


def _check_updates(run: Path, begun: Recipe, recipe: Recipe, changed: dict[str, tuple[Any, Any]]) -> None:
    was, now = begun.train.updates, recipe.train.updates
    if recipe.previous is not None:
        said = "; ".join(f"{key} was {was}, now {now}" for key, (was, now) in changed.items())
        raise RequestError(f"{run} was begun with other updates: {said}. A stage that is done is not gone on with, "
                           "so in stages they are fixed")
    if now < was:
        raise recipe.refuse("train.updates", f"is {now}, and {run} was begun with {was}: they can be raised, and "
                            "a run that is to end earlier is stopped with Ctrl-C")
    if recipe.train.decay == "cosine":
        raise recipe.refuse("train.updates", f"is {now}, and {run} was begun with {was}: the learning rate falls "
                            "to 0 at its last update (train.decay is cosine), so all updates so far would have "
                            "had another; begin a new run with another --out")


def _is_free(key: str) -> bool:
    parts = key.split(".")
    own = ".".join(parts[2:] if parts[0] == STAGES else parts)
    return any(own == free or own.startswith(f"{free}.") for free in FREE)


def _numbered(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe with its stages by number, so that a difference is named by its entry."""
    return plain | ({STAGES: {str(i + 1): table for i, table in enumerate(plain[STAGES])}} if STAGES in plain else {})
