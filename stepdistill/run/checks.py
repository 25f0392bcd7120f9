"""What can be known not to work before any weights are read. Every refusal of a combination stands here, with the
recipe's line."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import isclose
from typing import Any

import torch

from .. import resources
from ..diffusion.solvers import SOLVERS, STOCHASTIC
from ..errors import RequestError
from ..evaluation.reference import Source as ReferenceSource
from ..evaluation.reference import load_source
from ..evaluation.sweep import admitted
from ..methods import METHODS, load_method
from ..methods.base import Features, Frozen, Heads, Need, Trained
from ..models.adapters import named_layers
from ..models.attention import check_backend
from ..models.discriminator import Shape, chosen
from ..models.given_lora import given_lora
from ..models.roles import Full, Lora, Places, Setting, Solver, Weights
from ..models.teacher import Teacher, load_teacher
from ..models.vision import PlaneVisionConfig, VisionConfig
from ..recipe.schema import Critic, Recipe, RoleChoice
from ..recipe.values import size_of
from ..training.loop import DTYPES
from .buckets import check_buckets
from .negatives import check_negatives, check_unread
from .own_solver import check_own_solver
from .rewards import check_reward
from .sources import source_of
from .teacher_checks import (
    check_asked,
    check_family,
    check_guided,
    check_own_call,
    check_quantization,
    check_size,
    check_times,
    check_videos,
    family,
    quantization,
)


@dataclass(frozen=True)
class Checked:
    """settings: the method's own. needs: role -> what it is. roles: how each role is trained that the recipe
    configures."""

    settings: Any
    needs: Mapping[str, Need]
    roles: Mapping[str, Setting]


def check(recipe: Recipe) -> Checked:
    """RequestError for what cannot work, in this stage and between it and the one before."""
    check_family(recipe)
    check_buckets(recipe, family(recipe))
    check_size(recipe)
    settings, method = recipe.method_settings(), load_method(recipe.method)
    if reason := method.refusal(settings, recipe.data.kind):
        raise recipe.refuse(f"data.{recipe.data.kind}", f"does not suit the settings: {reason}")
    _check_solver(recipe)
    _check_nodes(recipe, method.waypoints(settings, recipe.steps))
    check_times(recipe, settings)
    needs = method.needs(settings, recipe.student.lora is None)
    if family(recipe).video is not None:
        check_videos(recipe, needs)
    check_own_solver(recipe, needs)
    roles = configured(recipe, needs)
    _check_reads(recipe, needs)
    if any(isinstance(need, Features) for need in needs.values()):
        vision_features(recipe)
    if (kind := quantization(recipe)) is not None:
        check_quantization(recipe, kind, settings, roles)
    check_asked(recipe, needs)
    check_guided(recipe, settings)
    check_negatives(recipe, needs)
    check_reward(recipe, needs)
    if recipe.train.fsdp:
        _check_fsdp(recipe, roles)
    if recipe.evaluate.reference is not None:
        reference_source(recipe)
    if recipe.train.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise recipe.refuse("train.optimizer", "is adamw8bit, which wants bitsandbytes, and that is not installed: "
                            "pip install stepdistill[bitsandbytes], or take adamw")
    if "wandb" in recipe.train.trackers and find_spec("wandb") is None:
        raise recipe.refuse("train.trackers", "names wandb, which is not installed: pip install stepdistill[wandb], "
                            "or take tensorboard")
    if recipe.previous is not None:
        _check_succession(recipe, needs, roles)
    return Checked(settings, needs, roles)


def needs_of(recipe: Recipe) -> dict[str, Need]:
    return load_method(recipe.method).needs(recipe.method_settings(), recipe.student.lora is None)


# -- roles -----------------------------------------------------------------------------------------------------------

def configured(recipe: Recipe, needs: Mapping[str, Need]) -> dict[str, Setting]:
    """How each role that the recipe configures is trained. RequestError for one that the method does not train."""
    trained = [name for name, need in needs.items() if isinstance(need, Trained | Heads)]
    for name in ("critic", "discriminator"):
        if vars(recipe)[name] is not None and name not in trained:
            when = "with these settings " if name in METHODS[recipe.method].needs else ""
            raise recipe.refuse(name, f"is given, but {when}{recipe.method} trains no {name}; "
                                f"it trains {', '.join(trained)}")
    roles: dict[str, Setting] = {"student": student_setting(recipe)}
    if recipe.critic is not None:
        roles["critic"] = role_setting(recipe.critic)
    if recipe.discriminator is not None:
        roles["discriminator"] = _places(recipe, needs)
        if recipe.discriminator.lr is not None and _weightless(needs):
            raise recipe.refuse("discriminator.lr", f"is {recipe.discriminator.lr:g}, but the discriminator of "
                                f"{recipe.method} is the mean of its critic's features, and has no weights: "
                                "leave it out")
    return roles


def _weightless(needs: Mapping[str, Need]) -> bool:
    """Whether the discriminator has none to train."""
    heads = needs["discriminator"]
    return isinstance(heads, Heads) and heads.kind == "channels"


def _check_fsdp(recipe: Recipe, roles: Mapping[str, Setting]) -> None:
    if full := [name for name, setting in roles.items() if isinstance(setting, Full)]:
        raise recipe.refuse("train.fsdp", f"is on, which shards a frozen base, but the {full[0]} trains all "
                            f"its weights: let it be a LoRA, such as {full[0]}: {{lora: {{rank: 32}}}}")
    if recipe.evaluate.reference is not None:
        raise recipe.refuse("evaluate.reference", f"is {recipe.evaluate.reference}, but figures are taken of whole "
                            "networks, and train.fsdp shards the base: leave it out, and `stepdistill bench` the run")


def found(name: str) -> str:
    """A path of the recipe as it is found from here; another name, such as shapes or inception, stays."""
    place = None if name in ("shapes", "none", "inception") else resources.locate(name)
    return name if place is None else str(place)


def reference_source(recipe: Recipe) -> ReferenceSource:
    """What a training's figures are measured against. RequestError, with the recipe's line, for what could not be
    measured."""
    choices = recipe.evaluate
    with recipe.blaming("evaluate.reference", f"is {choices.reference}, which nothing can be measured against"):
        source = load_source(found(choices.reference), choices.samples)
        return admitted(choices.samples, None if source.captioned else ["of the data"], [found(choices.features)],
                        found(choices.reference))


def role_setting(choice: RoleChoice | Critic) -> Lora | Full:
    if choice.lora is None:
        return Full()
    targets = choice.lora.targets
    return Lora(choice.lora.rank, choice.lora.alpha, None if targets is None else tuple(targets))


def student_setting(recipe: Recipe) -> Lora | Full | Solver:
    """How the student is trained. One that begins with a LoRA is that LoRA's form."""
    if recipe.trains_solver:
        return Solver(recipe.steps)
    if recipe.student.begins_with is None:
        return role_setting(recipe.student)
    with recipe.blaming("teacher", "cannot be loaded"):
        teacher = load_teacher(source_of(recipe), device="meta", resolution=size_of(recipe.resolution))
    return begun_with(recipe, teacher).setting


def begun_with(recipe: Recipe, teacher: Teacher) -> Weights:
    """The LoRA that the student begins with. RequestError for one that does not fit the teacher, or what the recipe
    says of it."""
    path, given = recipe.student.begins_with, recipe.student.lora
    with recipe.blaming("student.from", f"is {path}"):
        if family(recipe).no_pipeline:
            raise RequestError("the teacher is Toy, whose students are no LoRAs of a pipeline: leave it out")
        weights = given_lora(teacher, str(resources.locate(path) or path))
    found = weights.setting
    for name in ("rank", "alpha"):
        asked, own = vars(given)[name], vars(found)[name]
        if name in given.model_fields_set and asked is not None and not isclose(asked, own):
            raise recipe.refuse(f"student.lora.{name}", f"is {asked:g}, but the student begins with {path}, whose "
                                                        f"{name} is {own:g}: leave it out")
    if given.targets is not None:
        asked, own = (sorted(named_layers(teacher.network, targets)) for targets in (given.targets, found.targets))
        if asked != own:
            odd = sorted({*asked} ^ {*own})[0]
            raise recipe.refuse("student.lora.targets",
                                f"name {len(asked)} layers, but the student begins with {path}, which has {len(own)}, "
                                f"and {odd} is in one of both alone: leave them out")
    return weights


def _check_reads(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    """RequestError for roles that read numbers where the teacher's network has no place for them."""
    time = family(recipe).time
    reading = {name: time.own(need.reads) for name, need in needs.items() if isinstance(need, Trained)}
    if time.sinusoids is None and (name := next((name for name, own in reading.items() if own), None)):
        raise recipe.refuse("method", f"is {recipe.method}, whose {name} reads {', '.join(reading[name])} beside its "
                            "time, but this teacher's network has no one place where it could be added to the time: "
                            "choose settings without it (guidance_embedding: false), or another method")


def learning_rates(recipe: Recipe) -> dict[str, float]:
    """Role -> its learning rate, of those that have one of their own. A discriminator beside a critic learns at the
    critic's, unless it has another: they are one network's features and heads, and one optimizer's in the published
    training."""
    own = {"critic": recipe.critic, "discriminator": recipe.discriminator}
    found = {name: choice.lr for name, choice in own.items() if choice is not None and choice.lr is not None}
    needs = needs_of(recipe)
    if "critic" in found and "discriminator" in needs and not _weightless(needs):
        found.setdefault("discriminator", found["critic"])
    return found


def _places(recipe: Recipe, needs: Mapping[str, Need]) -> Places:
    features, network = recipe.discriminator.features, recipe.discriminator.network
    if network is not None and not isinstance(needs[needs["discriminator"].of], Features):
        raise recipe.refuse("discriminator.network",
                            f"is {network}, but the discriminator of {recipe.method} reads the "
                            f"features of its {needs['discriminator'].of}, not of pictures")
    return Places(None if features is None else tuple(features),
                  None if network is None else str(resources.locate(network) or network))


# -- what a discriminator reads --------------------------------------------------------------------------------------

def vision_network(recipe: Recipe) -> VisionConfig | PlaneVisionConfig:
    """The network whose features of pictures a discriminator reads, before its weights are."""
    name = None if recipe.discriminator is None else recipe.discriminator.network
    with recipe.blaming("discriminator.network", "cannot be used"):
        return family(recipe).vision(None if name is None else str(resources.locate(name) or name))


def vision_features(recipe: Recipe) -> dict[str, Shape]:
    """What a discriminator reads of its `vision_network`."""
    network = vision_network(recipe)
    with recipe.blaming("discriminator.features", "cannot be read"):
        return network.read(None if recipe.discriminator is None else recipe.discriminator.features)


def network_features(recipe: Recipe, shapes: Mapping[str, Shape], default: tuple[str, ...]) -> dict[str, Shape]:
    """What a discriminator reads of a network of the teacher's kind, whose features and default ones these are."""
    asked = None if recipe.discriminator is None else recipe.discriminator.features
    with recipe.blaming("discriminator.features", "cannot be read"):
        return chosen(shapes, default if asked is None else asked)


def check_attention(recipe: Recipe, backend: str, device: torch.device) -> None:
    """RequestError for a backend that cannot compute the teacher's attention on this device."""
    if backend == "auto" or device.type == "meta":
        return
    dtype = DTYPES.get(recipe.train.precision, torch.float32)
    with recipe.blaming("train.attention", f"is {backend}, which cannot serve"):
        check_backend(backend, device, dtype)
        teacher = load_teacher(source_of(recipe), device="meta")
        check_backend(backend, device, dtype, teacher.network)
        if backend == "flash" and "mask" in teacher.family.condition_shapes(teacher.parts, teacher.asked):
            raise RequestError("torch's flash kernel takes no mask, and texts of different length come with one: "
                               "choose sdpa")


def check_embeddings(recipe: Recipe, needs: Mapping[str, Need], within: bool) -> None:
    """RequestError for a role with an embedding of a scale or an exit on a network that reads its guidance scale by
    itself, `within`."""
    if not within:
        return
    check_unread(recipe)
    for name, scale in vars(recipe.method_settings()).items():
        if name in ("critic_training_guidance", "critic_guidance") and scale is not None and scale < 1:
            raise recipe.refuse(f"settings.{name}", f"is {scale:g}, but the teacher's network reads its "
                                "guidance scale by itself, and so does a critic on it, which reads the prompt at "
                                "any: let it be at least 1")
    named = [name for name, need in needs.items() if isinstance(need, Trained) and "w" in need.reads]
    if named:
        raise recipe.refuse("settings", f"give {' and '.join(named)} an embedding, but the teacher's network reads "
                            "its guidance scale by itself, and so does a student of it: let guidance_embedding "
                            "and exit_embedding be false")


# -- data ------------------------------------------------------------------------------------------------------------

def _check_solver(recipe: Recipe) -> None:
    data = recipe.data
    if data.samples is not None and (data.samples.solver == "own" or data.samples.call is not None):
        return check_own_call(recipe)
    serving = [name for name in SOLVERS if data.kind == "samples" or name not in STOCHASTIC]
    if data.made is not None and data.made.solver not in serving:
        why = " (a noise has a picture of its own only where no other noise is drawn)"
        raise recipe.refuse(f"data.{data.kind}.solver", f"is {data.made.solver}; {data.kind} are made by one of "
                            f"{', '.join(serving)}" + why * (data.made.solver in STOCHASTIC))


def _check_nodes(recipe: Recipe, waypoints: int) -> None:
    pairs = recipe.data.pairs
    if pairs is not None and pairs.nodes % waypoints:
        raise recipe.refuse("data.pairs.nodes",
                            f"is {pairs.nodes}; a student of {recipe.steps} steps lands on {waypoints} "
                            f"evenly spaced states of the teacher's way, and a multiple of {waypoints} holds them")


# -- stages ----------------------------------------------------------------------------------------------------------

def _check_succession(recipe: Recipe, needs: Mapping[str, Need], roles: Mapping[str, Setting]) -> None:
    """What a stage begins with must fit it: the student of the one before, and the teacher where that is the same."""
    _check_guidance_embedding(recipe, needs)
    _check_kept_form(recipe, needs, roles)
    before = recipe.previous
    _check_landings(recipe, needs)
    if not recipe.taught_by_previous:
        return
    _check_within(recipe, needs)
    embeds = "w" in needs_of(before)["student"].reads
    (low, high), (lowest, highest) = (w if isinstance(w, tuple) else (w, w) for w in (recipe.guidance, before.guidance))
    if not lowest <= low <= high <= highest or not embeds and (low, high) != (lowest, highest):
        raise recipe.refuse("guidance",
                            f"is {recipe.guidance}, but the teacher is the student of the stage before, which "
                            f"has learned {before.guidance}" + " and has no guidance embedding" * (not embeds))
    if reason := load_method(recipe.method).succession(recipe.steps, before.steps):
        raise recipe.refuse("steps", f"is {recipe.steps} after {before.steps}: {reason}")


def _check_within(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    """A student that has its guidance within is no teacher that is guided from without, and the other way round."""
    before, has = recipe.previous, {True: "has its guidance within", False: "is guided by its pipeline"}
    within, kept = (every.get("teacher", Frozen()).within for every in (needs, needs_of(before)))
    if within != kept and recipe.guidance != 1:
        raise recipe.refuse("method", f"is {recipe.method}, whose student {has[within]}, and that of the stage before "
                            f"{has[kept]}: let teacher be base, or both stages be of one method")


def _check_guidance_embedding(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    has = {True: "has a guidance embedding", False: "has no guidance embedding"}
    embeds, embedded = ("w" in needs["student"].reads, "w" in needs_of(recipe.previous)["student"].reads)
    if embedded and not embeds or recipe.taught_by_previous and embeds != embedded:
        raise recipe.refuse("method", f"is {recipe.method}, whose student {has[embeds]}, and that of the stage before "
                            f"{has[embedded]}: let both have one by their settings (guidance_embedding: true), or "
                            "neither")


def _check_landings(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    """A student that reads where to land is no teacher, which nobody tells it, and no start of one that does not."""
    before = recipe.previous
    if "r" in needs_of(before)["student"].reads and (recipe.taught_by_previous or "r" not in needs["student"].reads):
        raise recipe.refuse("method", f"is {recipe.method} after {before.method}, whose student reads where its "
                            f"steps land: only {before.method} can go on with it, taught by the base")


def _check_kept_form(recipe: Recipe, needs: Mapping[str, Need], roles: Mapping[str, Setting]) -> None:
    """A LoRA stays what it is, or becomes full."""
    before, taught, student = recipe.previous, recipe.taught_by_previous, roles["student"]
    begun = student_setting(before)
    begins = {"student": student} | {name: roles.get(name, student) for name, need in needs.items()
                                     if taught and isinstance(need, Trained) and need.start == "teacher"}
    for name, setting in begins.items():
        if setting not in (Full(), begun):
            raise recipe.refuse(name, f"is {_as_written(setting)}, but it begins as the student of the stage before, "
                                      "which "
                                f"is {_as_written(begun)}: a LoRA stays what it is, or becomes "
                                "full")
        if "w" in needs_of(before)["student"].reads and "w" not in needs[name].reads:
            raise recipe.refuse("method", f"is {recipe.method}, whose {name} begins as the teacher and has no guidance "
                                "embedding, which the student of the stage before has: let teacher be base")


def _as_written(setting: Setting) -> str:
    """As a recipe writes it."""
    entries = ", ".join(f"{name}: {value}" for name, value in vars(setting).items() if value is not None)
    return f"{{lora: {{{entries}}}}}" if isinstance(setting, Lora) else "full"
