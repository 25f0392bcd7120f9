"""From a recipe to everything that it names: the teacher, the roles, the method, the data."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from . import parallel, resources, runs
from .data.cache import Cache, Report, Shelf, contents, fingerprint, silent
from .data.datasets import (
    SAMPLES_PER_FILE,
    Dataset,
    Encoders,
    cached_images,
    live_images,
    prompts_only,
    teacher_pairs,
    teacher_samples,
)
from .data.images import open_images
from .data.prompts import Captions, open_prompts
from .diffusion.draws import key
from .diffusion.guidance import guided
from .diffusion.sampler import Sampler
from .diffusion.solvers import SOLVERS, STOCHASTIC, Seen, unseen
from .errors import RequestError
from .evaluation.plans import Target
from .judges import judged, tapped
from .methods import METHODS, load_method
from .methods.base import Features, Follows, Heads, Inference, Method, Need, Trained, due, middle
from .models.families import Family, load_teacher
from .models.roles import Full, Lora, Places, Roles, Setting, Weights, build_roles
from .models.schedulers import stock_scheduler
from .plane import check_plane
from .recipe import Critic, Recipe, RoleChoice
from .training import checkpoints


@dataclass(frozen=True)
class Before:
    """The student that a stage begins with. checksum: of its weights' file."""

    weights: Weights
    checksum: str


@dataclass(frozen=True)
class Work:
    """A recipe with everything that it names made. best: the role that samples. before: checksum of the student that it began with."""

    recipe: Recipe
    family: Family
    roles: Roles
    method: Method
    inference: Inference
    device: torch.device
    before: str | None = None

    @property
    def best(self) -> str:
        return best_of(self.recipe)

    @property
    def scale(self) -> float:
        """The recipe's guidance, of a range its middle."""
        return middle(self.recipe.guidance)

    def scheduler(self) -> SchedulerMixin:
        return stock_scheduler(self.inference.scheduler, self.inference.config, self.family.scheduler)

    def target(self, name: str) -> Target:
        """The student as a stock pipeline, for a bench."""
        pipeline = self.family.pipeline(self.roles.network(self.best).to(self.family.codec.dtype), self.scheduler())
        return Target(name, pipeline, self.recipe.method, dict(self.inference.call))


def make(recipe: Recipe, device: torch.device, dtype: torch.dtype | None = None, before: Before | None = None) -> Work:
    """Loads the teacher and builds the roles on it. RequestError, with the recipe's line, for what cannot work.

    before: what a stage after the first is trained from. Without it, as for a run that is only looked at, the student begins
    as the base, and the base is the teacher.
    """
    settings, needs, said = checked(recipe)
    kind = load_method(recipe.method)
    with recipe.blaming("teacher", "cannot be loaded"):
        family = load_teacher(resources.pipeline(recipe.teacher), recipe.revision, dtype or _dtype(recipe))
    inference, sampler = served(recipe, family)
    roles = _roles(recipe, family, needs, said, before).to(device)
    return Work(recipe, family, roles, kind(settings, roles, recipe.guidance, sampler), inference, device,
                None if before is None else before.checksum)


def checked(recipe: Recipe) -> tuple[Any, dict[str, Need], dict[str, Setting]]:
    """The method's settings, the roles that it needs and how those are trained that the recipe speaks of.

    RequestError for what can be known not to work before anything is loaded, in this stage and between it and the one before.
    """
    check_plane(recipe)
    settings, kind = recipe.method_settings(), load_method(recipe.method)
    if reason := kind.refusal(settings, recipe.data.kind):
        raise recipe.refuse(f"data.{recipe.data.kind}", f"does not suit the settings: {reason}")
    _check_solver(recipe)
    _check_nodes(recipe, kind.waypoints(settings, recipe.steps))
    needs = kind.needs(settings, recipe.student.lora is None)
    said = choices(recipe, needs)
    if any(isinstance(need, Features) for need in needs.values()):
        judged(recipe)
    if recipe.previous is not None:
        _check_succession(recipe, needs, said)
    return settings, needs, said


def _check_succession(recipe: Recipe, needs: Mapping[str, Need], said: Mapping[str, Setting]) -> None:
    """What a stage begins with must fit it: the student of the one before, and the teacher where that is the same."""
    before, taught, student = recipe.previous, recipe.taught_by_previous, said["student"]
    told = {True: "is told a guidance scale", False: "is told no guidance scale"}
    tells, was_told = needs["student"].told_w, needs_of(before)["student"].told_w
    if was_told and not tells or taught and tells != was_told:
        raise recipe.refuse("method", f"is {recipe.method}, whose student {told[tells]}, and that of the stage before {told[was_told]}: "
                            "let both be told one by their settings (told: true), or neither")
    begins = {"student": student} | {name: said.get(name, student) for name, need in needs.items()
                                     if taught and isinstance(need, Trained) and need.start == "teacher"}
    for name, setting in begins.items():
        if setting not in (Full(), _choice(before.student)):
            raise recipe.refuse(name, f"is {_named(setting)}, but it begins as the student of the stage before, which is "
                                f"{_named(_choice(before.student))}: a LoRA stays what it is, or becomes full")
        if was_told and not needs[name].told_w:
            raise recipe.refuse("method", f"is {recipe.method}, whose {name} begins as the teacher and {told[False]}, which the student of "
                                "the stage before is told: let teacher be base")
    if not taught:
        return
    (low, high), (lowest, highest) = (w if isinstance(w, tuple) else (w, w) for w in (recipe.guidance, before.guidance))
    if not lowest <= low <= high <= highest or not was_told and (low, high) != (lowest, highest):
        raise recipe.refuse("guidance", f"is {recipe.guidance}, but the teacher is the student of the stage before, which has learned "
                            f"{before.guidance}" + " and is told no other" * (not was_told))
    if reason := load_method(recipe.method).succession(recipe.steps, before.steps):
        raise recipe.refuse("steps", f"is {recipe.steps} after {before.steps}: {reason}")


def needs_of(recipe: Recipe) -> dict[str, Need]:
    return load_method(recipe.method).needs(recipe.method_settings(), recipe.student.lora is None)


def _named(setting: Setting) -> str:
    """As a recipe says it."""
    said = ", ".join(f"{name}: {value}" for name, value in vars(setting).items() if value is not None)
    return f"{{lora: {{{said}}}}}" if isinstance(setting, Lora) else "full"


def _check_solver(recipe: Recipe) -> None:
    data = recipe.data
    serving = [name for name in SOLVERS if data.kind == "samples" or name not in STOCHASTIC]
    if data.made is not None and data.made.solver not in serving:
        raise recipe.refuse(f"data.{data.kind}.solver", f"is {data.made.solver}; {data.kind} are made by one of {', '.join(serving)}"
                            + " (a noise has a picture of its own only where no other noise is drawn)" * (data.made.solver in STOCHASTIC))


def _check_nodes(recipe: Recipe, waypoints: int) -> None:
    pairs = recipe.data.pairs
    if pairs is not None and pairs.nodes % waypoints:
        raise recipe.refuse("data.pairs.nodes", f"is {pairs.nodes}; a student of {recipe.steps} steps lands on {waypoints} evenly spaced "
                            f"states of the teacher's way, and a multiple of {waypoints} holds them")


def choices(recipe: Recipe, needs: Mapping[str, Need]) -> dict[str, Setting]:
    """How each role that the recipe speaks of is trained. RequestError for one that the method does not train."""
    trained = [name for name, need in needs.items() if isinstance(need, Trained | Heads)]
    for name in ("critic", "discriminator"):
        if vars(recipe)[name] is not None and name not in trained:
            when = "with these settings " if name in METHODS[recipe.method].needs else ""
            raise recipe.refuse(name, f"is given, but {when}{recipe.method} trains no {name}; it trains {', '.join(trained)}")
    said: dict[str, Setting] = {"student": _choice(recipe.student)}
    if recipe.critic is not None:
        said["critic"] = _choice(recipe.critic)
    if recipe.discriminator is not None:
        said["discriminator"] = _places(recipe, needs)
    return said


def _places(recipe: Recipe, needs: Mapping[str, Need]) -> Places:
    features, network = recipe.discriminator.features, recipe.discriminator.network
    if network is not None and not isinstance(needs[needs["discriminator"].of], Features):
        raise recipe.refuse("discriminator.network", f"is {network}, but the discriminator of {recipe.method} reads the features of its "
                            f"{needs['discriminator'].of}, not of pictures")
    return Places(None if features is None else tuple(features), None if network is None else str(resources.locate(network) or network))


def rates(recipe: Recipe) -> dict[str, float]:
    """Role -> its learning rate, of those that have one of their own. A discriminator beside a critic learns at the critic's, unless
    it has another: they are one network's features and heads, and one optimizer's in the published training."""
    own = {"critic": recipe.critic, "discriminator": recipe.discriminator}
    found = {name: said.lr for name, said in own.items() if said is not None and said.lr is not None}
    if "critic" in found and "discriminator" in needs_of(recipe):
        found.setdefault("discriminator", found["critic"])
    return found


def _choice(choice: RoleChoice | Critic) -> Lora | Full:
    if choice.lora is None:
        return Full()
    targets = choice.lora.targets
    return Lora(choice.lora.rank, choice.lora.alpha, None if targets is None else tuple(targets))


def served(recipe: Recipe, family: Family) -> tuple[Inference, Sampler]:
    """How the student is sampled. RequestError for a number of steps that its scheduler does not serve."""
    kind = load_method(recipe.method)
    try:
        inference = kind.inference(recipe.method_settings(), recipe.steps, family.schedule_name, recipe.guidance)
        inference = replace(inference, call={**inference.call, **family.call})
        scheduler = stock_scheduler(inference.scheduler, inference.config, family.scheduler)
        return inference, Sampler.of_call(scheduler, recipe.steps, family.schedule, inference.call)
    except ValueError as error:
        raise recipe.refuse("steps", f"is {recipe.steps}, which cannot be sampled: {error}") from error


def _roles(recipe: Recipe, family: Family, needs: dict[str, Need], said: Mapping[str, Setting], before: Before | None) -> Roles:
    told = tuple(name for name, need in needs.items() if isinstance(need, Trained) and need.told_w)
    if any(isinstance(need, Heads) and not isinstance(needs[need.of], Features) for need in needs.values()):
        tapped(recipe, family.feature_shapes, family.default_features)
    if recipe.train.ema is not None:
        needs = needs | {"ema": Follows("student", recipe.train.ema)}
    begun = ("student", "teacher") if recipe.taught_by_previous else ("student",)
    return build_roles(family, needs, said, told_w=told, begin={} if before is None else dict.fromkeys(begun, before.weights),
                       gradient_checkpointing=recipe.train.gradient_checkpointing, seed=recipe.train.seed)


def _dtype(recipe: Recipe) -> torch.dtype:
    """Of the teacher: half the memory where it stays frozen; a role of all weights starts from all their digits."""
    roles = [recipe.student] + ([] if recipe.critic is None else [recipe.critic])
    return torch.bfloat16 if recipe.train.precision == "bf16" and all(role.lora is not None for role in roles) else torch.float32


def best_of(recipe: Recipe) -> str:
    """The role that samples."""
    return "student" if recipe.train.ema is None else "ema"


def handed(recipe: Recipe, run: Path) -> Before:
    """What the stage before leaves to this one, from its run folder."""
    before, folder = recipe.previous, runs.checkpoint_of(run)
    role = best_of(before)
    weights = Weights(_choice(before.student), checkpoints.load_role(folder, role), needs_of(before)["student"].told_w)
    return Before(weights, checkpoints.checksum_of(folder, role))


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
    said = data.prompts if data.made is None else data.made.prompts
    return open_prompts(_found(said) if isinstance(said, str) else list(said), seed)


def dataset(work: Work, report: Report = silent) -> Dataset:
    """What batches come from; whatever is to be kept on disk is made here, by the first rank."""
    data, cache = work.recipe.data, Cache(report=report)
    encoders = _encoders(work)
    with parallel.main_first():
        if data.kind == "images":
            return (cached_images if data.cache else live_images)(source(work), encoders, cache)
        if data.kind == "prompts":
            return prompts_only(source(work), encoders, cache)
        if data.kind == "pairs":
            return _pairs(work, cache)
        return teacher_samples(source(work), data.count, partial(_generate, work), _made_by(work), encoders, cache)


def pairs_shelf(work: Work, cache: Cache, out: str | Path | None = None) -> Shelf:
    """Where the recipe's pairs lie or are to lie: the cache, unless the recipe or `out` names a folder.

    RequestError for a folder that holds pairs made otherwise. There the teacher is known by what its files hold, so that
    pairs can be carried to another machine.
    """
    recipe, family = work.recipe, work.family
    name = recipe.data.pairs.path if out is None else str(out)
    teacher = _identity(family) | ({} if name is None else {"teacher": contents(family.source)})
    identity = {"source": source(work).identity, "made_by": _made_by(work), "teacher": teacher}
    folder = None if name is None else resources.locate(name) or Path(name)
    shelf = cache.shelf("pairs", identity, recipe.data.count, SAMPLES_PER_FILE, folder)
    if name is not None and (otherwise := shelf.found_otherwise()):
        raise recipe.refuse("data.pairs.path" if out is None else "--out", f"is {name}, whose pairs were made otherwise: "
                            f"{'; '.join(otherwise)}. The right ones are made by `stepdistill pairs {recipe.arguments} --out FOLDER`, "
                            "with a folder of their own")
    return shelf


def fill_pairs(work: Work, shelf: Shelf, cache: Cache) -> Dataset:
    """The recipe's pairs, once those that are missing have been made."""
    said = work.recipe.data.pairs
    times = _times(said.steps)[said.steps // said.nodes::said.steps // said.nodes]
    return teacher_pairs(source(work), shelf, partial(_generate_pairs, work), times, _encoders(work), cache)


def _pairs(work: Work, cache: Cache) -> Dataset:
    """For training: a folder that the recipe names must hold them all, so that a slip in its name is noticed."""
    recipe, shelf = work.recipe, pairs_shelf(work, cache)
    if recipe.data.pairs.path is not None and (made := shelf.made()) < recipe.data.count:
        raise recipe.refuse("data.pairs.path", f"is {recipe.data.pairs.path}, which holds {made} of {recipe.data.count} pairs: "
                            f"`stepdistill pairs {recipe.arguments}` makes them")
    return fill_pairs(work, shelf, cache)


def prompts(work: Work, count: int = 4) -> list[str]:
    """Of the pictures to look at: the recipe's, else the first of its data."""
    if work.recipe.evaluate.prompts:
        return list(work.recipe.evaluate.prompts)
    found = source(work)
    return found.captions(torch.arange(count if found.count is None else min(count, found.count)))


@torch.no_grad()
def _generate(work: Work, ids: Tensor, texts: list[str], seen: Seen = unseen) -> Tensor:
    """The teacher's latents of numbered samples, a function of their numbers."""
    said = work.recipe.data.made
    return SOLVERS[said.solver](guided(work.roles["teacher"], _made_scale(work)), _noise(work, ids, "start"), _times(said.steps),
                                work.family.encode(texts), lambda i, _: _noise(work, ids, i), seen)


def _generate_pairs(work: Work, ids: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The noises of those samples, and the states that are kept of the ways from there: (B, C, H, W), (B, n, C, H, W)."""
    said, nodes = work.recipe.data.pairs, []
    _generate(work, ids, texts, lambda i, x: nodes.append(x) if due(i + 1, said.steps // said.nodes) else None)
    return _noise(work, ids, "start"), torch.stack(nodes, 1)


def _noise(work: Work, ids: Tensor, name: object) -> Tensor:
    draw = lambda i: torch.Generator().manual_seed(key(work.recipe.train.seed, "teacher sample", name, i))
    return torch.stack([torch.randn(work.family.latent_shape, generator=draw(i)) for i in ids.tolist()]).to(work.device)


def _times(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def _made_by(work: Work) -> dict[str, Any]:
    """All that the teacher's samples or pairs depend on, beside the teacher and the prompts."""
    said = work.recipe.data.made.model_dump(exclude={"prompts", "path"})
    by = {"student": work.before} if work.before is not None and work.recipe.taught_by_previous else {}
    return said | {"guidance": _made_scale(work), "seed": work.recipe.train.seed} | by


def _made_scale(work: Work) -> float:
    said = work.recipe.data.made.guidance
    return work.scale if said is None else said


def _encoders(work: Work) -> Encoders:
    return Encoders(work.family.encode, work.family.encode_images, _identity(work.family), work.device)


def pixels_of(family: Family) -> int:
    """The side of the teacher's pictures."""
    return family.decode(torch.zeros(1, *family.latent_shape)).shape[-1]


def _identity(family: Family) -> dict[str, Any]:
    return {"teacher": fingerprint(family.source), "revision": family.revision, "dtype": str(next(family.network.parameters()).dtype)}


def _found(name: str) -> str:
    """A path of the recipe as it is found from here; `shapes` stays `shapes`."""
    found = None if name == "shapes" else resources.locate(name)
    return name if found is None else str(found)
