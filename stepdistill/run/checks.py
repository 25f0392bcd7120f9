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
from ..diffusion.schedule import RectifiedFlow
from ..diffusion.solvers import SOLVERS, STOCHASTIC
from ..diffusion.toy import is_toy
from ..errors import RequestError
from ..methods import METHODS, load_method
from ..methods.base import Features, Heads, Need, Trained
from ..models.adapters import named_layers
from ..models.attention import check_backend
from ..models.discriminator import Shape, chosen
from ..models.families import Family
from ..models.given_lora import given_lora
from ..models.quantized import check_installed
from ..models.roles import Full, Lora, Places, Setting, Weights
from ..models.schedulers import stock_call
from ..models.sources import index_at
from ..models.teacher import Teacher, family_at, load_teacher
from ..models.vision import PlaneVisionConfig, VisionConfig
from ..models.weights import settled
from ..recipe.schema import Critic, Recipe, RoleChoice
from ..training.loop import DTYPES
from .sources import source_of


@dataclass(frozen=True)
class Checked:
    """settings: the method's own. needs: role -> what it is. roles: how each role is trained that the recipe
    configures."""

    settings: Any
    needs: Mapping[str, Need]
    roles: Mapping[str, Setting]


def check(recipe: Recipe) -> Checked:
    """RequestError for what cannot work, in this stage and between it and the one before."""
    _check_family(recipe)
    settings, method = recipe.method_settings(), load_method(recipe.method)
    if reason := method.refusal(settings, recipe.data.kind):
        raise recipe.refuse(f"data.{recipe.data.kind}", f"does not suit the settings: {reason}")
    _check_solver(recipe)
    _check_nodes(recipe, method.waypoints(settings, recipe.steps))
    _check_times(recipe, settings)
    needs = method.needs(settings, recipe.student.lora is None)
    if family(recipe).video is not None:
        _check_videos(recipe, needs)
    roles = configured(recipe, needs)
    _check_reads(recipe, needs)
    if any(isinstance(need, Features) for need in needs.values()):
        vision_features(recipe)
    if quantization(recipe) is not None:
        _check_quantization(recipe, settings, roles)
    _check_guided(recipe, settings)
    if recipe.train.fsdp:
        _check_fsdp(recipe, roles)
    if recipe.train.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise recipe.refuse("train.optimizer", "is adamw8bit, which wants bitsandbytes, and that is not installed: "
                            "pip install stepdistill[bitsandbytes], or take adamw")
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
    return roles


def _check_fsdp(recipe: Recipe, roles: Mapping[str, Setting]) -> None:
    if full := [name for name, setting in roles.items() if isinstance(setting, Full)]:
        raise recipe.refuse("train.fsdp", f"is on, which shards a frozen base, but the {full[0]} trains all its weights: "
                            f"let it be a LoRA, such as {full[0]}: {{lora: {{rank: 32}}}}")
    if recipe.evaluate.reference is not None:
        raise recipe.refuse("evaluate.reference", f"is {recipe.evaluate.reference}, but figures are taken of whole networks, and "
                            "train.fsdp shards the base: leave it out, and `stepdistill bench` the run")


def role_setting(choice: RoleChoice | Critic) -> Lora | Full:
    if choice.lora is None:
        return Full()
    targets = choice.lora.targets
    return Lora(choice.lora.rank, choice.lora.alpha, None if targets is None else tuple(targets))


def student_setting(recipe: Recipe) -> Lora | Full:
    """How the student is trained. One that begins with a LoRA is that LoRA's form."""
    if recipe.student.begins_with is None:
        return role_setting(recipe.student)
    with recipe.blaming("teacher", "cannot be loaded"):
        teacher = load_teacher(source_of(recipe), device="meta", resolution=recipe.resolution)
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
    if "critic" in found and "discriminator" in needs_of(recipe):
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
    """RequestError for a role with an embedding of a scale or an exit on a network that reads its guidance scale by itself, `within`."""
    named = [name for name, need in needs.items() if within and isinstance(need, Trained) and "w" in need.reads]
    if named:
        raise recipe.refuse("settings", f"give {' and '.join(named)} an embedding, but the teacher's network reads its guidance scale by "
                            "itself, and so does a student of it: let guidance_embedding and exit_embedding be false")


def quantization(recipe: Recipe) -> str | None:
    """How the base's denoiser is quantised, as the recipe asks or as it was saved."""
    if family(recipe).no_pipeline:
        return None
    with recipe.blaming("teacher", "cannot be loaded"):
        source = source_of(recipe)
        return settled(source, index_at(source)).quantization


def _check_quantization(recipe: Recipe, settings: Any, roles: Mapping[str, Setting]) -> None:
    """RequestError for what a base of few bits cannot carry, and where its library is missing."""
    asked, kind = recipe.teacher.quantization is not None, quantization(recipe)
    base = f"is {kind}" if asked else f"has a base that was saved as {kind}"
    path = "teacher.quantization" if asked else "teacher"
    with recipe.blaming(path, base):
        check_installed()
    if full := [name for name, setting in roles.items() if isinstance(setting, Full)]:
        raise recipe.refuse(full[0], f"trains all its weights, but the base is quantised ({kind}), whose weights take "
                                     "no updates: let it be a LoRA, such as {lora: {rank: 32}}")
    if recipe.teacher.loras:
        raise recipe.refuse("teacher.loras", f"are given, but the base is quantised ({kind}), and a sum with a LoRA "
                                             "would be rounded to few bits: save the pipeline with its LoRAs fused, "
                                             "and let teacher.base name that")
    for name in ("fsdp", "compile"):
        if vars(recipe.train)[name]:
            raise recipe.refuse(f"train.{name}", f"is on, but the base is quantised ({kind}), whose layers it does "
                                f"not serve: leave it off")
    if vars(settings).get("derivative") == "exact":
        raise recipe.refuse("settings.derivative", f"is exact, but the base is quantised ({kind}), whose layers have "
                            f"no derivative forward: take pair")


def _check_guided(recipe: Recipe, settings: Any) -> None:
    """RequestError for what only guided calls of the teacher read, where none is guided."""
    made = recipe.data.made
    scales = [recipe.guidance, None if made is None else made.guidance,
              *(value for name, value in vars(settings).items() if "guidance" in name)]
    if all(scale in (None, False, 1) for scale in scales) and (guided := source_of(recipe).guided):
        raise recipe.refuse([*guided][0], "is given, but guidance is 1, and a teacher without guidance does not read "
                                          "it: give a scale above 1, such as guidance: 5.0")


# -- data ------------------------------------------------------------------------------------------------------------

def _check_solver(recipe: Recipe) -> None:
    data = recipe.data
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


def _check_times(recipe: Recipe, settings: Any) -> None:
    """RequestError for times of a flow that no call of the teacher's pipeline takes, and no scheduler makes of their number."""
    if family(recipe).sigmas:
        return
    try:
        inference = load_method(recipe.method).inference(settings, recipe.steps, RectifiedFlow(), recipe.guidance)
        stock_call(inference, RectifiedFlow(), sigmas=False)
    except ValueError as error:
        raise recipe.refuse("steps", f"is {recipe.steps}, which cannot be sampled: {error}") from error


# -- stages ----------------------------------------------------------------------------------------------------------

def _check_succession(recipe: Recipe, needs: Mapping[str, Need], roles: Mapping[str, Setting]) -> None:
    """What a stage begins with must fit it: the student of the one before, and the teacher where that is the same."""
    _check_guidance_embedding(recipe, needs)
    _check_kept_form(recipe, needs, roles)
    before = recipe.previous
    if not recipe.taught_by_previous:
        return
    embeds = "w" in needs_of(before)["student"].reads
    (low, high), (lowest, highest) = (w if isinstance(w, tuple) else (w, w) for w in (recipe.guidance, before.guidance))
    if not lowest <= low <= high <= highest or not embeds and (low, high) != (lowest, highest):
        raise recipe.refuse("guidance",
                            f"is {recipe.guidance}, but the teacher is the student of the stage before, which "
                            f"has learned {before.guidance}" + " and has no guidance embedding" * (not embeds))
    if reason := load_method(recipe.method).succession(recipe.steps, before.steps):
        raise recipe.refuse("steps", f"is {recipe.steps} after {before.steps}: {reason}")


def _check_guidance_embedding(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    has = {True: "has a guidance embedding", False: "has no guidance embedding"}
    embeds, embedded = ("w" in needs["student"].reads, "w" in needs_of(recipe.previous)["student"].reads)
    if embedded and not embeds or recipe.taught_by_previous and embeds != embedded:
        raise recipe.refuse("method", f"is {recipe.method}, whose student {has[embeds]}, and that of the stage before "
                            f"{has[embedded]}: let both have one by their settings (guidance_embedding: true), or "
                            "neither")


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


# -- the teacher's family --------------------------------------------------------------------------------------------

def family(recipe: Recipe) -> Family:
    """The family of the recipe's teacher, before any weights are read."""
    with recipe.blaming("teacher", "cannot be loaded"):
        return family_at(source_of(recipe))


def _check_family(recipe: Recipe) -> None:
    """RequestError for entries that the teacher's family does not serve, and for data of another kind than its
    samples."""
    served = family(recipe)
    points, (path, data) = served.samples == "points", _data(recipe)
    if points and not _are_points(data):
        raise recipe.refuse(path, f"is {data}, but the teacher is Toy, whose samples are points of the plane: give its own "
                            f"folder, {recipe.teacher.base}")
    if not points and _are_points(data):
        raise recipe.refuse(path, f"is {data}, a folder of Toy, whose samples are points of the plane, but the teacher "
                            f"{recipe.teacher.base} is none: give shapes, or {path.rsplit('.', 1)[-1]} of your own")
    with recipe.blaming("frames", "cannot be"):
        served.size(None, recipe.frames)
    for entry, reason in served.unserved.items():
        value = _entry(recipe, entry)
        if value not in (None, False, "auto") and not (entry.endswith("guidance") and value == 1):
            raise recipe.refuse(entry, f"is {'on' if value is True else value}, but {reason}")


def _check_videos(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    """RequestError for what is made for pictures alone, where the teacher makes videos."""
    if recipe.data.kind == "images" and recipe.frames != 1:
        raise recipe.refuse("data.images", f"is {recipe.data.images}, but the teacher makes videos, and a picture is a video of one "
                            "frame: let frames be 1, or take prompts, samples or pairs, which need no data of yours")
    if recipe.evaluate.reference is not None:
        raise recipe.refuse("evaluate.reference", f"is {recipe.evaluate.reference}, but figures are of pictures, and the teacher "
                            "makes videos: leave it out")
    if any(isinstance(need, Features) for need in needs.values()):
        raise recipe.refuse("method", f"is {recipe.method}, whose discriminator reads features of pictures, but the teacher makes "
                            "videos: ladd and dmd2 judge by the features of its own network")


def _entry(recipe: Recipe, path: str) -> object:
    found: object = recipe
    for name in path.split("."):
        found = None if found is None else getattr(found, name)
    return found


def _data(recipe: Recipe) -> tuple[str, str | tuple[str, ...]]:
    """Where the recipe names its images or prompts, and which."""
    data = recipe.data
    if data.made is not None:
        return f"data.{data.kind}.prompts", data.made.prompts
    return f"data.{data.kind}", data.images or data.prompts


def _are_points(data: str | tuple[str, ...]) -> bool:
    return isinstance(data, str) and (found := resources.locate(data)) is not None and is_toy(found)
