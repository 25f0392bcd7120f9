"""What a teacher and its family do not serve, known before any weights are read."""
from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers

from .. import resources
from ..data.videos import KINDS, check_decoder, video_files
from ..diffusion.schedule import RectifiedFlow, VariancePreserving
from ..diffusion.toy import is_toy
from ..methods.base import Features, Frozen, Need, Reward
from ..models.families import Family
from ..models.quantized import check_installed
from ..models.roles import Full, Setting
from ..models.schedulers import stock_call
from ..models.sources import class_at, index_at
from ..models.teacher import family_at, load_teacher
from ..models.weights import settled
from ..recipe.schema import Recipe
from ..recipe.values import buckets_of, size_of
from .inference import inference_of
from .sources import bring_family, is_outside, source_of


def family(recipe: Recipe) -> Family:
    """The family of the recipe's teacher, before any weights are read."""
    with recipe.blaming("teacher", "cannot be loaded"):
        source = source_of(recipe)
        bring_family(class_at(source), recipe.plugged)
        return family_at(source)


def check_family(recipe: Recipe) -> None:
    """RequestError for entries that the teacher's family does not serve, and for data of another kind than its
    samples."""
    served = family(recipe)
    points, (path, data) = served.samples == "points", data_of(recipe)
    is_outside(recipe, path, data)
    if points and not _are_points(data):
        raise recipe.refuse(path, f"is {data}, but the teacher is Toy, whose samples are points of the plane: "
                            f"give its own folder, {recipe.teacher.base}")
    if not points and _are_points(data):
        raise recipe.refuse(path, f"is {data}, a folder of Toy, whose samples are points of the plane, but the teacher "
                            f"{recipe.teacher.base} is none: give shapes, or {path.rsplit('.', 1)[-1]} of your own")
    with recipe.blaming("frames", "cannot be"):
        served.size(None, recipe.frames)
    for entry, reason in served.unserved.items():
        value = _entry(recipe, entry)
        if value not in (None, False, "auto") and not (entry.endswith("guidance") and value == 1):
            raise recipe.refuse(entry, f"is {'on' if value is True else value}, but {reason}")


def check_size(recipe: Recipe) -> None:
    """RequestError for a size that the teacher does not draw, by its configs alone. Of buckets see `check_buckets`."""
    if recipe.resolution is None or buckets_of(recipe.resolution) is not None:
        return
    with recipe.blaming("teacher", "cannot be loaded"):
        teacher = load_teacher(source_of(recipe), device="meta", frames=recipe.frames)
    with recipe.blaming("resolution", f"is {recipe.resolution}, which the teacher does not draw"):
        teacher.shape_at((size, size) if isinstance(size := size_of(recipe.resolution), int) else size)


def check_videos(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    """RequestError for what is made for pictures alone, where the teacher makes videos, and for films that nothing here
    decodes."""
    if recipe.data.kind == "images" and recipe.frames != 1:
        folder = resources.locate(recipe.data.images)
        if folder is None or not Path(folder).is_dir() or not (videos := video_files(Path(folder))):
            raise recipe.refuse("data.images", f"is {recipe.data.images}, but the teacher makes videos: name a "
                                f"folder of {KINDS}, or let frames be 1, since a picture is a video of one frame, "
                                "or take prompts, samples or pairs, which need no data of yours")
        with recipe.blaming("data.images", f"is {recipe.data.images}"):
            check_decoder(videos)
    if recipe.evaluate.reference is not None:
        raise recipe.refuse("evaluate.reference", f"is {recipe.evaluate.reference}, but figures are of pictures, "
                            "and the teacher makes videos: leave it out")
    if any(isinstance(need, Features) for need in needs.values()):
        raise recipe.refuse("method", f"is {recipe.method}, whose discriminator reads features of pictures, but "
                            "the teacher makes videos: ladd and dmd2 judge by the features of its own network")
    if any(isinstance(need, Reward) for need in needs.values()):
        raise recipe.refuse("method", f"is {recipe.method}, whose reward scores pictures, but the teacher makes "
                            "videos: take another method")


def _entry(recipe: Recipe, path: str) -> object:
    found: object = recipe
    for name in path.split("."):
        found = None if found is None else getattr(found, name)
    return found


def data_of(recipe: Recipe) -> tuple[str, str | tuple[str, ...]]:
    """Where the recipe names its images or prompts, and which."""
    data = recipe.data
    return (f"data.{data.kind}" + ".prompts" * (data.made is not None),
            data.images or data.prompts if data.made is None else data.made.prompts)


def _are_points(data: str | tuple[str, ...]) -> bool:
    return isinstance(data, str) and (found := resources.locate(data)) is not None and is_toy(found)


def quantization(recipe: Recipe) -> str | None:
    """How the base's denoiser is quantised, as the recipe asks or as it was saved."""
    if family(recipe).no_pipeline:
        return None
    with recipe.blaming("teacher", "cannot be loaded"):
        source = source_of(recipe)
        return settled(source, index_at(source)).quantization


def check_quantization(recipe: Recipe, kind: str, settings: Any, roles: Mapping[str, Setting]) -> None:
    """RequestError for what a base of few bits cannot carry, and where its library is missing. kind: as `quantization`
    found it."""
    asked = recipe.teacher.quantization is not None
    base = f"is {kind}" if asked else f"has a base that was saved as {kind}"
    path = "teacher.quantization" if asked else "teacher"
    with recipe.blaming(path, base):
        check_installed(kind)
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


def check_asked(recipe: Recipe, needs: Mapping[str, Need]) -> None:
    """RequestError for what only a teacher's calls read, where the method asks no teacher."""
    if any(isinstance(need, Frozen) for need in needs.values()):
        return
    made, free = recipe.data.made, f"{recipe.method} asks no teacher"
    if recipe.guidance != 1:
        raise recipe.refuse("guidance", f"is {recipe.guidance}, but {free} that could be guided: let it be 1, or "
                            "train on pictures that a guided teacher made, such as data: {samples: {prompts: shapes, "
                            "guidance: 3.0}, count: 4096}")
    if recipe.taught_by_previous:
        raise recipe.refuse("method", f"is {free.replace(' asks', ', which asks')}, but that of this stage is "
                            "previous: leave teacher: previous out; the student begins with that of the stage before "
                            "all the same")
    if (made is None or made.guidance in (None, 1)) and (guided := source_of(recipe).guided):
        raise recipe.refuse([*guided][0], f"is given, but {free} that could read it: leave it out")


def check_guided(recipe: Recipe, settings: Any) -> None:
    """RequestError for what only guided calls of the teacher read, where none is guided."""
    made = recipe.data.made
    scales = [recipe.guidance, None if made is None else made.guidance,
              *(value for name, value in vars(settings).items() if "guidance" in name)]
    if all(scale in (None, False, 1) for scale in scales) and (guided := source_of(recipe).guided):
        raise recipe.refuse([*guided][0], "is given, but guidance is 1, and a teacher without guidance does not read "
                                          "it: give a scale above 1, such as guidance: 5.0")


def check_own_call(recipe: Recipe) -> None:
    """RequestError for samples by the pipeline's own call that cannot be made so."""
    samples, served = recipe.data.samples, family(recipe)
    if samples.solver != "own" or samples.call is None:
        raise recipe.refuse("data.samples", f"have solver: {samples.solver} and call: {samples.call}, but a call "
                            "is of solver: own, and that wants one: solver: own, call: {num_inference_steps: 4, "
                            "guidance_scale: 1.0}")
    if served.no_pipeline:
        raise recipe.refuse("data.samples.solver", "is own, but the teacher is Toy, which has no pipeline: take "
                            "another, such as ddim")
    if samples.guidance is not None:
        raise recipe.refuse("data.samples.guidance", f"is {samples.guidance:g}, but the pipeline is called as "
                            "data.samples.call says, its guidance too: leave it out")
    if recipe.train.precision == "fp16":
        raise recipe.refuse("train.precision", "is fp16, in which the pipeline itself cannot be called to make "
                            "data.samples: take bf16 or fp32")
    taken = signature(getattr(diffusers, kind := class_at(source_of(recipe))).__call__).parameters
    if names := [name for name in samples.call if name not in taken]:
        raise recipe.refuse("data.samples.call", f"names {', '.join(names)}, which a call of {kind} does not take")


ANY_NOISE = (RectifiedFlow(), VariancePreserving.of([1 - i / 1001 for i in range(1, 1001)]))       # one of each kind


def check_times(recipe: Recipe, settings: Any) -> None:
    """RequestError for a number of steps that the method serves under no noise, and for times that no call of the
    teacher's pipeline takes, and no scheduler makes of their number."""
    if vars(settings).get("start_time") is not None:
        return _check_start(recipe, settings)
    refusals = []
    for schedule in ANY_NOISE:
        try:
            inference_of(recipe, schedule)
        except ValueError as error:
            refusals.append(error)
    if len(refusals) == len(ANY_NOISE):
        raise recipe.refuse("steps", f"is {recipe.steps}, which cannot be sampled: {refusals[-1]}") from refusals[-1]
    if family(recipe).sigmas:
        return
    try:
        stock_call(inference_of(recipe, RectifiedFlow()), RectifiedFlow(), sigmas=False)
    except ValueError as error:
        raise recipe.refuse("steps", f"is {recipe.steps}, which cannot be sampled: {error}") from error


def _check_start(recipe: Recipe, settings: Any) -> None:
    """As `check_times`, where the settings name the first time: by the teacher's configs alone."""
    with recipe.blaming("teacher", "cannot be loaded"):
        teacher = load_teacher(source_of(recipe), device="meta", resolution=size_of(recipe.resolution),
                               frames=recipe.frames)
    try:
        teacher.sampler(teacher.stock_call(inference_of(recipe, teacher.schedule)))
    except ValueError as error:
        raise recipe.refuse("settings.start_time", f"is {settings.start_time:g}, where no sampling can begin: "
                            f"{error}") from error
