"""From a recipe to everything that it names: the teacher, the roles, the method, the data."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from . import parallel, resources, runs
from .data.cache import Cache, Report, fingerprint, silent
from .data.datasets import Dataset, Encoders, cached_images, live_images, prompts_only, teacher_samples
from .data.images import open_images
from .data.prompts import Captions, open_prompts
from .diffusion.draws import key
from .diffusion.guidance import guided
from .diffusion.sampler import Sampler
from .diffusion.solvers import SOLVERS
from .errors import RequestError
from .evaluation.plans import Target
from .export import stock_scheduler
from .methods import load_method
from .methods.base import Follows, Inference, Method, Need, Trained
from .models.families import Family, load_teacher
from .models.roles import Full, Lora, Roles, build_roles
from .recipe import Recipe, RoleChoice
from .training import checkpoints


@dataclass(frozen=True)
class Work:
    """A recipe with everything that it names made. best: the role that samples."""

    recipe: Recipe
    family: Family
    roles: Roles
    method: Method
    inference: Inference
    device: torch.device

    @property
    def best(self) -> str:
        return "ema" if "ema" in self.roles.names else "student"

    @property
    def scale(self) -> float:
        """The recipe's guidance, of a range its middle."""
        return middle(self.recipe.guidance)

    def scheduler(self) -> SchedulerMixin:
        return stock_scheduler(self.inference.scheduler, self.inference.config, self.family.scheduler)

    def sampler(self) -> Sampler:
        return _sampler(self.scheduler(), self.recipe.steps, self.family, self.inference.call)

    def target(self, name: str) -> Target:
        """The student as a stock pipeline, for a bench."""
        pipeline = self.family.pipeline(self.roles.network(self.best).to(self.family.codec.dtype), self.scheduler())
        return Target(name, pipeline, self.recipe.method, dict(self.inference.call))


def make(recipe: Recipe, device: torch.device, dtype: torch.dtype | None = None) -> Work:
    """Loads the teacher and builds the roles on it. RequestError, with the recipe's line, for what cannot work."""
    settings = recipe.method_settings()
    kind = load_method(recipe.method)
    needs = kind.needs(settings, recipe.student.lora is None)
    choices = _choices(recipe, needs)
    family = load_teacher(resources.pipeline(recipe.teacher), recipe.revision, dtype or _dtype(recipe))
    inference = _inference(recipe, kind, settings, family)
    roles = _roles(recipe, family, needs, choices).to(device)
    return Work(recipe, family, roles, kind(settings, roles, recipe.guidance, recipe.steps), inference, device)


def _choices(recipe: Recipe, needs: Mapping[str, Need]) -> dict[str, Lora | Full]:
    """How each role that the recipe speaks of is trained."""
    trained = [name for name, need in needs.items() if isinstance(need, Trained)]
    if recipe.critic is not None and "critic" not in trained:
        raise recipe.refuse("critic", f"is given, but {recipe.method} trains no critic; it trains {', '.join(trained)}")
    said = {"student": recipe.student} | ({"critic": recipe.critic} if recipe.critic is not None else {})
    return {name: _choice(choice) for name, choice in said.items()}


def _choice(choice: RoleChoice) -> Lora | Full:
    if choice.lora is None:
        return Full()
    targets = choice.lora.targets
    return Lora(choice.lora.rank, choice.lora.alpha, None if targets is None else tuple(targets))


def _inference(recipe: Recipe, kind: type[Method], settings: Any, family: Family) -> Inference:
    try:
        inference = kind.inference(settings, recipe.steps, family.schedule_name, recipe.guidance)
        inference = replace(inference, call={**inference.call, **family.call})
        _sampler(stock_scheduler(inference.scheduler, inference.config, family.scheduler), recipe.steps, family, inference.call)
    except ValueError as error:
        raise recipe.refuse("steps", f"is {recipe.steps}, which cannot be sampled: {error}") from error
    return inference


def _sampler(scheduler: SchedulerMixin, steps: int, family: Family, call: Mapping[str, Any]) -> Sampler:
    """The sampler of a pipeline call. ValueError where the scheduler does not serve that many steps."""
    return Sampler.of(scheduler, steps, family.schedule, **{name: call[name] for name in ("timesteps", "sigmas") if name in call})


def _roles(recipe: Recipe, family: Family, needs: dict[str, Need], choices: Mapping[str, Lora | Full]) -> Roles:
    told = tuple(name for name, need in needs.items() if isinstance(need, Trained) and need.told_w)
    if recipe.train.ema is not None:
        needs = needs | {"ema": Follows("student", recipe.train.ema)}
    return build_roles(family, needs, choices, told_w=told, gradient_checkpointing=recipe.train.gradient_checkpointing,
                       seed=recipe.train.seed)


def _dtype(recipe: Recipe) -> torch.dtype:
    """Of the teacher: half the memory where it stays frozen; a student of all weights starts from all their digits."""
    return torch.bfloat16 if recipe.train.precision == "bf16" and recipe.student.lora is not None else torch.float32


def open_run(run: str | Path) -> Work:
    """A run with its sampling role as the last checkpoint left it, in float32 on the CPU."""
    run = Path(run)
    work = make(runs.recipe_of(run), torch.device("cpu"), torch.float32)
    folder = runs.checkpoint_of(run)
    state = checkpoints.load_role(folder, work.best)
    try:
        work.roles.load_state_dict(work.best, state)
    except ValueError as error:
        raise RequestError(f"{folder} does not fit the recipe beside it: {error}") from error
    return work


# -- data ----------------------------------------------------------------------------------------------------------------

def source(work: Work) -> Captions:
    """The pictures or prompts that the recipe names."""
    data, seed = work.recipe.data, work.recipe.train.seed
    if data.kind == "images":
        return open_images(_found(data.images), pixels_of(work.family), seed, data.count)
    said = data.prompts if data.kind == "prompts" else data.samples.prompts
    return open_prompts(_found(said) if isinstance(said, str) else list(said), seed)


def dataset(work: Work, report: Report = silent) -> Dataset:
    """What batches come from; whatever is to be kept on disk is made here, by the first rank."""
    data, cache = work.recipe.data, Cache(report=report)
    encoders = Encoders(work.family.encode, work.family.encode_images, _identity(work.family), work.device)
    with parallel.main_first():
        if data.kind == "images":
            return (cached_images if data.cache else live_images)(source(work), encoders, cache)
        if data.kind == "prompts":
            return prompts_only(source(work), encoders, cache)
        made_by = data.samples.model_dump(exclude={"prompts"}) | {"guidance": _samples_scale(work), "seed": work.recipe.train.seed}
        return teacher_samples(source(work), data.count, partial(_generate, work), made_by, encoders, cache)


def prompts(work: Work, count: int = 4) -> list[str]:
    """Of the pictures to look at: the recipe's, else the first of its data."""
    if work.recipe.evaluate.prompts:
        return list(work.recipe.evaluate.prompts)
    found = source(work)
    return found.captions(torch.arange(count if found.count is None else min(count, found.count)))


@torch.no_grad()
def _generate(work: Work, ids: Tensor, texts: list[str]) -> Tensor:
    """The teacher's latents of numbered samples, a function of their numbers."""
    said, shape = work.recipe.data.samples, work.family.latent_shape
    noise = lambda name: torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(
        key(work.recipe.train.seed, "teacher sample", name, i))) for i in ids.tolist()]).to(work.device)
    times = torch.linspace(1, 0, said.steps + 1, dtype=torch.float64)
    return SOLVERS[said.solver](guided(work.roles["teacher"], _samples_scale(work)), noise("start"), times,
                                work.family.encode(texts), lambda i, _: noise(i))


def _samples_scale(work: Work) -> float:
    said = work.recipe.data.samples.guidance
    return work.scale if said is None else said


def pixels_of(family: Family) -> int:
    """The side of the teacher's pictures."""
    return family.decode(torch.zeros(1, *family.latent_shape)).shape[-1]


def _identity(family: Family) -> dict[str, Any]:
    return {"teacher": fingerprint(family.source), "revision": family.revision, "dtype": str(next(family.network.parameters()).dtype)}


def _found(name: str) -> str:
    """A path of the recipe as it is found from here; `shapes` stays `shapes`."""
    found = None if name == "shapes" else resources.locate(name)
    return name if found is None else str(found)


def middle(guidance: float | Sequence[float]) -> float:
    """A scale as it is, of a range its middle."""
    return guidance if isinstance(guidance, int | float) else sum(guidance) / 2
