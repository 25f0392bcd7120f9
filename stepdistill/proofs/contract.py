"""Contract: what a method says of its roles is what happens, on the real pipeline of its shapes recipe."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import export, train
from ..data.stream import Stream
from ..errors import RequestError
from ..methods import METHODS
from ..methods.base import Follows, Frozen, middle
from ..recipe import Recipe
from ..recipe.catalogue import builtin
from ..recipe.plugins import Folder
from ..run.data import dataset
from ..run.setup import Run, setup, train_config
from ..training import Trainer, checkpoints
from .pipelines import decays, kept_pairs, stock_teachers
from .problem import Check

STEPS, BATCH, COUNT = 2, 2, 4


def first(method: str, plugins: Folder | None = None) -> str | dict[str, Any]:
    """Its first recipe for a shipped pipeline, that of its own name if there is one; of a plugin's method that has
    none, a plain one."""
    known = builtin(None if plugins is None else plugins.path)
    names = [name for name, path in known.items() if name.startswith("shapes/") and path.stem.split("-")[0] == method]
    names.sort(key=lambda name: name != f"shapes/{method}")
    entry = METHODS[method]
    kind = entry.data[0]
    made = {"prompts": "shapes", "steps": 4, "nodes": 4} if kind == "pairs" else {"prompts": "shapes", "steps": 4}
    data = {kind: "shapes" if kind in ("images", "prompts") else made} | ({} if kind == "prompts" else {"count": COUNT})
    return names[0] if names else {"method": method, "teacher": "assets/shapes-sd", "steps": entry.steps[0],
                                   "student": {"lora": {"rank": 4}},
                                   "data": data | {"batch": BATCH}, "train": {"updates": STEPS}}


def recipe(method: str, plugins: Folder | None = None) -> Recipe:
    """The method's first recipe for a shipped pipeline, cut down to two steps of its student on two samples."""
    name, own = first(method, plugins), {} if plugins is None else {"plugins": str(plugins.path)}
    plain = Recipe.load(name, own).resolved()
    data: dict[str, Any] = {"data.batch": BATCH, "data.cache": False}
    if plain["data"]["count"] is not None or plain["data"]["images"] == "shapes":
        data["data.count"] = COUNT
    for made in ("samples", "pairs"):
        if plain["data"][made] is not None:
            data[f"data.{made}.steps"] = data.get(f"data.{made}.steps", plain["data"][made].get("nodes", 1))
    # where the student waits for records, that is cut down to one of each
    waits = {f"settings.{name}": 1 for name in ("records", "record_every", "interval") if name in plain["settings"]}
    short = {"train.updates": STEPS + 2 * bool(waits), "train.checkpoint_every": 1, "train.warmup": 0,
             "train.accumulate": 1,
             "train.log_every": 1}
    return Recipe.load(name, data | waits | short | own)


def contract(method: str, seed: int, out: Path, plugins: Folder | None = None) -> Iterator[Check]:
    plain = recipe(method, plugins).resolved()
    seeded = Recipe.load(plain | {"train": plain["train"] | {"seed": seed}})
    work = setup(seeded, torch.device("cpu"))
    yield from stock_teachers(method, seed)
    yield from kept_pairs(seeded)
    yield from moves(work, out / "moved")
    yield from decays(seeded, work.roles)
    whole = train(seeded, out=out / "whole")
    yield Check("tensors of a run that was stopped and resumed which differ from the whole run's",
                resumed(seeded, whole, out / "resumed"), 0)
    if seeded.trains_solver:
        yield refused(whole)
        return
    try:
        scale = middle(seeded.guidance) if "w" in work.roles.reads["student"] else None
        folder = export(whole, "lora" if seeded.student.lora else "pipeline", scale, out / "export")
        missing = [part for part in ("stepdistill.json", "README.md", "scheduler") if not (folder / part).exists()]
        yield Check("parts that are missing of an export, which a stock pipeline has reproduced", len(missing), 0)
    except RequestError as error:
        yield Check(f"exports that a stock pipeline does not reproduce ({error})", 1, 0)


def refused(run: Path) -> Check:
    """A solver is in no config of a stock scheduler."""
    try:
        export(run, "pipeline")
        left = 1
    except RequestError:
        left = 0
    return Check("exports of a solver, which no stock pipeline draws with", left, 0)


def moves(work: Run, run: Path) -> Iterator[Check]:
    """Trains it and looks at every tensor of every role, and at the teacher's own network."""
    recipe, roles = work.recipe, work.roles
    stream = Stream(dataset(work), BATCH, recipe.train.seed, work.teacher.latent_shape, prompts=work.judged)
    trainer = Trainer(work.method, roles, stream, train_config(recipe), run)
    # adapters lie on the teacher's network
    own = {id(parameter) for name in roles.names for parameter in roles.parameters(name)}
    base = {name: tensor for name, tensor in work.teacher.network.state_dict(keep_vars=True).items()
            if id(tensor) not in own}
    before, base_before = {name: _copy(roles.state_dict(name)) for name in roles.names}, _copy(base)
    for index in range(recipe.train.updates):
        trainer.step(index)
    moved = {name for name in roles.names if _apart(before[name], roles.state_dict(name))}
    trained = {role for update in trainer.updates for role in update.trains}
    follow = {name for name, need in roles.needs.items() if isinstance(need, Follows) and need.moves}
    frozen = {name for name, need in roles.needs.items() if isinstance(need, Frozen)}
    yield Check("roles that updates train, or that follow one, and that did not move",
                len((trained | follow) - moved), 0)
    yield Check("roles that moved and that no update trains", len(moved - trained - follow), 0)
    yield Check("tensors of the teacher's network that moved", _apart(base_before, base), 0)
    reached = [p for p in work.teacher.network.parameters() if id(p) not in own and p.grad is not None]
    reached += [p for name in frozen for p in roles.parameters(name) if p.grad is not None]
    yield Check("weights of frozen roles that a gradient reached", len(reached), 0)


def resumed(recipe: Recipe, whole: Path, run: Path) -> int:
    """How many tensors of roles and optimizers differ, once half of the run is forgotten and made again."""
    shutil.copytree(whole, run)
    shutil.rmtree(checkpoints.latest(run))
    train(recipe, out=run, resume=True)
    found, known = (checkpoints.load(checkpoints.latest(folder)) for folder in (run, whole))
    return sum(_apart(known[part], found[part]) for part in known) + len(known.keys() ^ found.keys())


def _copy(state: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _apart(one: Any, other: Any) -> int:
    """How many tensors are not the same to the last bit."""
    return sum(not torch.equal(tensor, other[name]) for name, tensor in one.items() if isinstance(tensor, Tensor))
