"""A student that is a solver: what it does not go with, and where it cannot leave to. Known before anything is
loaded."""
from __future__ import annotations

from collections.abc import Mapping

from ..errors import RequestError
from ..methods.base import Need
from ..recipe import Recipe


def check_own_solver(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    """RequestError where the method trains a solver and the recipe a network, or the other way round, and for what a
    solver has no use for."""
    solver = needs["student"].solver is not None
    if solver != recipe.trains_solver:
        raise recipe.refuse("student", f"trains a network, but {recipe.method} trains a solver of the teacher's own "
                            "network: let it be solver" if solver else
                            f"is solver, but {recipe.method} trains a network: let it be {{lora: {{rank: 32}}}}, or "
                            "full")
    if recipe.previous is not None and (solver or recipe.previous.trains_solver):
        raise recipe.refuse("student", "is solver, in one of several stages, but a solver belongs to one network and "
                            "its steps, and hands none over: leave the stages out")
    if not solver:
        return
    if isinstance(recipe.guidance, tuple):
        raise recipe.refuse("guidance", f"is {list(recipe.guidance)}, but a solver is fitted at one scale, at which "
                            "its pipeline then guides: give one, such as guidance: 2.0")
    if recipe.train.fsdp:
        raise recipe.refuse("train.fsdp", "is on, which shards a base that carries LoRAs, but the student is solver, "
                            "whose base takes no gradients and fits where it can be sampled: leave it off")


def check_leaves(recipe: Recipe) -> None:
    """RequestError for an export of a student that is a solver."""
    if recipe.trains_solver:
        raise RequestError(f"the student of this run is a solver ({recipe.method}): its {recipe.steps - 1} numbers are "
                           "added in the steps of a sampler, and no scheduler of diffusers has a config that holds "
                           "them. `stepdistill sample` and `stepdistill bench` draw with it from the run; for stock "
                           "diffusers train a network, such as progressive or lcm with student: {lora: {rank: 32}}")
