"""Convergence: a method's Toy recipe, trained on a mixture drawn from the seed, measured against exact samples.

The distance is the energy distance to 20,000 exact samples, the mean over the classes, in units of that of the
teacher's one step of DDIM. Exact samples themselves have about 0.0003; the limits are 0.03 at one evaluation and 0.01
at four, and where no network is trained a share of the teacher's own distance there.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..api import train
from ..diffusion.contracts import Condition
from ..diffusion.draws import Step
from ..diffusion.sampler import Sampler
from ..diffusion.solvers import ddim
from ..diffusion.toy import SHAPE, Toy, write
from ..evaluation.clouds import cloud, energy_distance, points_of, within
from ..methods import load_method
from ..recipe import Recipe
from ..recipe.catalogue import builtin
from ..recipe.plugins import Folder
from ..run.inference import inference_of
from ..run.setup import Run, open_run
from .problem import NAMES, Check, Problem

COUNT, SHOWN, WAYS = 20_000, 3000, 24
LIMITS = {1: 0.03, 2: 0.03, 4: 0.01}
# limits at one evaluation of those without a score to match
GAN_ONLY = {"ladd": 0.05, "lightning": 0.05, "add": 0.05}
# of those that train no network: what is left of the teacher's own distance by as many steps of DDIM, at most
SOLVERS = {"d_ode": 0.5}
SHOWN_AT = (1, 2, 4)
DRAWN, IN = "drawn.safetensors", "shown "          # the file, and what the names of students' states in it begin with


def recipes(method: str, plugins: Folder | None = None) -> list[str]:
    """The names of its Toy recipes, of those that ship and of a folder of plugins."""
    known = builtin(None if plugins is None else plugins.path)
    return [name for name, path in known.items() if name.startswith("toy/") and path.stem.split("-")[0] == method]


def loaded(name: str, plugins: Folder | None = None) -> Recipe:
    """A recipe by one of these names."""
    return Recipe.load(name, {} if plugins is None else {"plugins": str(plugins.path)})


class Distance:
    """To exact samples of a Toy problem, class by class, in units of the teacher's one step."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.exact, self.labels = toy.points(torch.arange(COUNT) + COUNT)
        self.classes = toy.points(torch.arange(COUNT))[1]            # the classes of what is to be measured
        self.within = {k: within(points_of(self.exact)[self.labels == k]) for k in self.classes.unique().tolist()}

    def of(self, samples: Tensor) -> float:
        """samples (COUNT, 2, 1, 1), of `classes`. Without the unit."""
        apart = [energy_distance(points_of(samples)[self.classes == k], points_of(self.exact)[self.labels == k], known)
                 for k, known in self.within.items()]
        return sum(apart) / len(apart)

    def cond(self, work: Run) -> Condition:
        cond = work.teacher.encode(self.toy.captions(torch.arange(COUNT)))
        return cond.replace(w=torch.ones(COUNT)) if "w" in work.roles.reads[work.sampling_role] else cond

    @cached_property
    def moment(self) -> Step:
        """Of the noise, the same for everyone."""
        return Step(self.toy.seed, 0, 0.0, "measured", 0, torch.arange(COUNT))

    @torch.no_grad()
    def of_teacher(self, work: Run, steps: int) -> float:
        """By DDIM."""
        times, cond = torch.linspace(1, 0, steps + 1, dtype=torch.float64), self.cond(work).replace(w=None)
        return self.of(ddim(work.roles.base, self.moment.normal("start", SHAPE), times, cond))


def problem(seed: int, method: str, folder: Path, recipe: Recipe) -> Path:
    """The drawn mixture's folder, under the seed's own kind of noise if the method serves it. recipe: one of its Toy
    recipes."""
    kind, first = load_method(method), Problem(seed, NAMES[0]).uniform() < 0.5
    for noise in NAMES if first else reversed(NAMES):
        drawn = Problem(seed, noise)
        try:
            drawn.sampler(kind.inference(recipe.method_settings(), recipe.steps, drawn.schedule))
        except ValueError:
            continue
        return write(folder / noise, seed, noise)
    raise ValueError(f"{method} serves none of {', '.join(NAMES)}")


def on(name: str, teacher: Path, seed: int, plugins: Folder | None = None, **changes: Any) -> Recipe:
    """A Toy recipe on another mixture than the one it names."""
    plain = loaded(name, plugins).resolved()
    whole = plain["teacher"]

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(inner) for key, inner in value.items()}
        if isinstance(value, list):                                  # of stages
            return [moved(inner) for inner in value]
        return str(teacher) if value == whole else value
    return Recipe.load({**moved(plain), "train": {**plain["train"], "seed": seed}, **changes})


def sampler(work: Run, steps: int) -> Sampler:
    """Of the trained method at another number of evaluations. ValueError where it does not serve it."""
    teacher = work.teacher
    found = teacher.sampler(teacher.stock_call(inference_of(work.recipe, teacher.schedule, steps)))
    return found.fitted(work.roles[work.sampling_role])


@torch.no_grad()
def states(work: Run, found: Sampler, distance: Distance) -> list[Tensor]:
    """Of every evaluation and, the last, the samples: (COUNT, 2, 1, 1) each."""
    cond, role = distance.cond(work), work.roles[work.sampling_role]
    role = found.telling(role) if "r" in work.roles.reads[work.sampling_role] else role
    draw = lambda i: distance.moment.normal(f"renoise {i}", SHAPE)
    return [found.rollout(role, distance.moment.normal("start", SHAPE), i, cond, draw) for i in range(found.nfe + 1)]


def convergence(name: str, seed: int, out: Path, plugins: Folder | None = None) -> Iterator[Check]:
    """Trains a Toy recipe, and leaves in `out` what `draw` shows of it."""
    method = loaded(name, plugins).method
    teacher = problem(seed, method, out / "toy", loaded(recipes(method, plugins)[0], plugins))
    distance, shown = Distance(Toy(teacher)), {}
    work = open_run(train(on(name, teacher, seed, plugins), out=out / "run"))
    unit = distance.of_teacher(work, 1)
    for steps in sorted({*SHOWN_AT, *work.recipe.evaluate.nfe}):
        measured = steps in work.recipe.evaluate.nfe
        try:
            found = sampler(work, steps)
        except ValueError:                       # this many steps are not served
            if measured:
                raise
            continue
        found = states(work, found, distance)
        shown[f"{name.removeprefix('toy/')}, {steps} step{'s' * (steps > 1)}"] = torch.stack([points_of(x)[:SHOWN]
                                                                                              for x in found])
        if measured:
            taught = distance.of_teacher(work, steps) / unit
            limit = (SOLVERS[method] * taught if method in SOLVERS else
                     GAN_ONLY.get(method, LIMITS[1]) if steps == 1 else LIMITS[steps])
            yield Check(f"energy distance at {steps} evaluations; {name}, {teacher.name}; teacher {taught:.3f}",
                        distance.of(found[-1]) / unit, limit)
    kept = {"exact": points_of(distance.exact)[:SHOWN], "labels": distance.labels[:SHOWN],
            "classes": distance.classes[:SHOWN]}
    save_file({name: tensor.contiguous()
               for name, tensor in (kept | {f"{IN}{title}": ways for title, ways in shown.items()}).items()},
               out / DRAWN)


def draw(folders: Iterable[Path], picture: Path) -> None:
    """Exact samples, and the students' of these convergences with some of their ways. Nothing where none came to an
    end."""
    panels, ways = {}, {}
    for kept in [load_file(folder / DRAWN) for folder in folders if (folder / DRAWN).is_file()]:
        shown = {name.removeprefix(IN): states for name, states in kept.items() if name.startswith(IN)}
        panels["exact"] = kept["exact"], kept["labels"]
        panels |= {title: (states[-1], kept["classes"]) for title, states in shown.items()}
        ways |= {title: states[:, :WAYS].transpose(0, 1) for title, states in shown.items()}
    if panels:
        cloud(panels, picture, ways, columns=4)
