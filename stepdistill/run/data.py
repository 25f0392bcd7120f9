"""From a run to what its batches come from: captions, images, the teacher's samples and pairs."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import resources
from ..data.buckets import Bucketed
from ..data.cache import Cache, Report, StoreSpec, contents, fingerprint, silent
from ..data.datasets import (
    SAMPLES_PER_FILE,
    Dataset,
    Encoders,
    cached_images,
    captioned,
    live_images,
    prompts_only,
    teacher_pairs,
    teacher_samples,
)
from ..data.images import BothWays, Uncaptioned, open_images
from ..data.negatives import Negatives
from ..data.prompts import Captions, open_prompts
from ..data.sources import open_source
from ..data.videos import VideoImages
from ..diffusion.draws import key
from ..diffusion.guidance import guided
from ..diffusion.solvers import SOLVERS, Seen, unseen
from ..diffusion.times import even
from ..methods.base import due
from ..models.stock import pictures, say_cut
from ..models.teacher import Teacher, load_teacher
from ..recipe import Recipe, plugins
from ..recipe.values import size_of
from ..training.loop import DTYPES
from .buckets import bucketed
from .checks import found
from .negatives import negative_prompts
from .setup import Run
from .sources import is_outside, source_of
from .teacher_checks import data_of, family

LOOKED_AT = 20_000                                    # prompts whose length is looked at
SAMPLE = "teacher sample"                             # what the noises of the teacher's own samples are for


def captions(run: Run) -> Captions:
    """The pictures or prompts that the recipe names. They may be very many, and are looked through once."""
    if "data" not in run.opened:
        run.opened["data"] = _opened(run.recipe, run.teacher)
    return run.opened["data"]


def check_data(recipe: Recipe) -> None:
    """RequestError for pictures or prompts, of any stage, that cannot be read: before any weights of the teacher are.
    Every picture is decoded once, which is remembered."""
    for stage in {repr(stage.data.model_dump(exclude={"batch"})): stage for stage in recipe.stages}.values():
        made_here = data_of(stage)[1] == "shapes" or family(stage).samples == "points"
        if not made_here:
            with stage.blaming("teacher", "cannot be loaded"):
                teacher = load_teacher(source_of(stage), device="meta", resolution=size_of(stage.resolution),
                                       frames=stage.frames)
            _opened(stage, teacher)


def _opened(recipe: Recipe, teacher: Teacher) -> Captions:
    data, seed, reads = recipe.data, recipe.train.seed, teacher.family.reads(teacher.network)
    if data.kind == "images" and is_outside(recipe, "data.images", data.images):
        source = open_source(data.images, plugins.mark_of("data", data.images), pixels_of(teacher), seed, data.count)
        return Uncaptioned(source) if reads == "nothing" else source
    if data.kind == "images" and teacher.frames not in (None, 1):
        return VideoImages.open(Path(found(data.images)), pixels_of(teacher), teacher.frames, data.count)
    if data.kind == "images":
        return open_images(found(data.images), pixels_of(teacher), seed, data.count, reads)
    entry, named = data_of(recipe)
    if is_outside(recipe, entry, named):
        return open_source(named, plugins.mark_of("data", named), None, seed, None)
    if (named == "none") != (reads == "nothing"):
        right = f"reads {reads}: name some" if named == "none" else "reads neither texts nor classes: let it be none"
        raise recipe.refuse(entry, f"is {named}, but the teacher {right}")
    return open_prompts(found(named) if isinstance(named, str) else list(named), seed)


def dataset(run: Run, report: Report = silent) -> Dataset | Bucketed:
    """What batches come from; whatever is to be kept on disk is made here, by all ranks together."""
    data, cache, encoders = run.recipe.data, Cache(report=report), _encoders(run)
    if run.sizes:
        return bucketed(run.recipe, run.teacher, captions(run), encoders, cache)
    if data.kind == "images":
        images = captions(run)
        return (cached_images if data.cache else live_images)(BothWays(images) if data.flip else images,
                                                              encoders, cache)
    if data.kind == "prompts":
        return prompts_only(captions(run), encoders, cache)
    if data.kind == "pairs":
        return _pairs(run, cache)
    make = _generate if data.samples.call is None else _by_its_own_call
    return teacher_samples(captions(run), data.count, partial(make, run), _made_by(run), encoders, cache)


def negatives(run: Run) -> Negatives | None:
    """What the student learns to be drawn away from; None for one without guidance of its own."""
    asked = run.recipe.negatives
    if asked is None:
        return None
    source = negative_prompts(run.recipe)
    own = replace(_encoders(run), text=partial(run.teacher.encode, negative=True),
                  identity={"negative": _identity(run.teacher)})
    return Negatives(captioned(source, own, Cache()), source.count, asked.share)


def preview_prompts(run: Run, count: int = 4) -> list[str]:
    """Of the pictures to look at: the recipe's, else the first of its data."""
    if run.recipe.evaluate.prompts:
        return list(run.recipe.evaluate.prompts)
    found = captions(run)
    return found.captions(torch.arange(count if found.count is None else min(count, found.count)))


def say_long(run: Run, say: Callable[[str], None]) -> None:
    """One line where prompts of the data, among the first ones, are longer than the teacher's text encoders read."""
    loaded, texts = run.teacher.loaded, captions(run)
    if loaded is not None and texts.count is not None:
        first = texts.captions(torch.arange(min(texts.count, LOOKED_AT)))
        say_cut(type(loaded), loaded.components, first, run.stock.call, say)


def pixels_of(teacher: Teacher) -> int | tuple[int, int]:
    """The side of the teacher's pictures, or their height and width."""
    height, width = teacher.decode(torch.zeros(1, *teacher.latent_shape)).shape[-2:]
    return height if height == width else (height, width)


# -- the teacher's samples and pairs ---------------------------------------------------------------------------------

def pairs_spec(run: Run, cache: Cache, out: str | Path | None = None) -> StoreSpec:
    """Where the recipe's pairs lie or are to lie: the cache, unless the recipe or `out` names a folder.

    RequestError for a folder that holds pairs made otherwise. There the teacher is known by what its files hold, so
    that pairs can be carried to another machine.
    """
    recipe, teacher = run.recipe, run.teacher
    name = recipe.data.pairs.path if out is None else str(out)
    made_on = _identity(teacher, fingerprint if name is None else contents)
    identity = {"source": captions(run).identity, "made_by": _made_by(run), "teacher": made_on}
    folder = None if name is None else resources.locate(name) or Path(name)
    spec = cache.spec("pairs", identity, recipe.data.count, ("noise", "nodes"), SAMPLES_PER_FILE, folder)
    if name is not None and (otherwise := spec.found_otherwise()):
        raise recipe.refuse("data.pairs.path" if out is None else "--out",
                            f"is {name}, whose pairs were made otherwise: "
                            f"{'; '.join(otherwise)}. The right ones are made by `stepdistill pairs {recipe.arguments} "
                            "--out FOLDER`, with a folder of their own")
    return spec


def fill_pairs(run: Run, spec: StoreSpec, cache: Cache) -> Dataset:
    """The recipe's pairs, once those that are missing have been made."""
    pairs = run.recipe.data.pairs
    times = even(pairs.steps)[pairs.steps // pairs.nodes::pairs.steps // pairs.nodes]
    return teacher_pairs(captions(run), spec, partial(_generate_pairs, run), times, _encoders(run), cache)


def _pairs(run: Run, cache: Cache) -> Dataset:
    """For training: a folder that the recipe names must hold them all, so that a slip in its name is noticed."""
    recipe, spec = run.recipe, pairs_spec(run, cache)
    if recipe.data.pairs.path is not None and (made := spec.made()) < recipe.data.count:
        raise recipe.refuse("data.pairs.path",
                            f"is {recipe.data.pairs.path}, which holds {made} of {recipe.data.count} pairs: "
                            f"`stepdistill pairs {recipe.arguments}` makes them")
    return fill_pairs(run, spec, cache)


@torch.no_grad()
def _generate(run: Run, ids: Tensor, texts: list[str], seen: Seen = unseen) -> Tensor:
    """The teacher's latents of numbered samples, a function of their numbers."""
    made = run.recipe.data.made
    teacher = guided(run.roles.get("teacher", run.roles.base), _guidance(run))       # a method need not ask one
    return SOLVERS[made.solver](teacher, noises(run, SAMPLE, "start", ids), even(made.steps), run.teacher.encode(texts),
                                lambda i, _: noises(run, SAMPLE, i, ids), seen)


@torch.no_grad()
def _by_its_own_call(run: Run, ids: Tensor, texts: list[str]) -> Tensor:
    """Latents of the pictures that the stock pipeline draws under its own scheduler: encoded, as pictures of a user
    are."""
    teacher, dtype = run.teacher, DTYPES.get(run.recipe.train.precision)
    generators = [torch.Generator().manual_seed(key(run.recipe.train.seed, SAMPLE, "start", i)) for i in ids.tolist()]
    teacher.loaded.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(), torch.autocast(run.device.type, dtype, dtype is not None, cache_enabled=False):
        # of those that keep the generator to themselves
        torch.manual_seed(key(run.recipe.train.seed, SAMPLE, "pipeline", ids[0].item()))
        drawn = pictures(teacher.loaded, teacher.family.prompts, texts, generator=generators,
                         **run.recipe.data.samples.call)
    return teacher.encode_images(drawn * 2 - 1)


def _generate_pairs(run: Run, ids: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The noises of those samples, and the states that are kept of the ways from there: (B, ...), (B, n, ...)."""
    made, nodes = run.recipe.data.pairs, []
    _generate(run, ids, texts, lambda i, x: nodes.append(x) if due(i + 1, made.steps // made.nodes) else None)
    return noises(run, SAMPLE, "start", ids), torch.stack(nodes, 1)


def noises(run: Run, use: str, name: object, ids: Tensor) -> Tensor:
    """(B, ...) unit normal on the run's device: a function of the run's seed, what it is for, its name and each
    sample's number."""
    draw = lambda i: torch.Generator().manual_seed(key(run.recipe.train.seed, use, name, i))
    return torch.stack([torch.randn(run.teacher.latent_shape, generator=draw(i)) for i in ids.tolist()]).to(run.device)


def _made_by(run: Run) -> dict[str, Any]:
    """All that the teacher's samples or pairs depend on, beside the teacher and the prompts."""
    made = run.recipe.data.made.model_dump(exclude={"prompts", "path"})
    # which caches of old do not know
    made = {name: value for name, value in made.items() if (name, value) != ("call", None)}
    student = {"student": run.previous} if run.previous is not None and run.recipe.taught_by_previous else {}
    return made | {"guidance": _guidance(run), "seed": run.recipe.train.seed} | student


def _guidance(run: Run) -> float:
    own = run.recipe.data.made.guidance
    return run.guidance if own is None else own


def _encoders(run: Run) -> Encoders:
    return Encoders(run.teacher.encode, run.teacher.encode_images, _identity(run.teacher), run.device)


def _identity(teacher: Teacher, mark: Callable[[str], str] = fingerprint) -> dict[str, Any]:
    """What a teacher's results depend on. mark: of a folder or file."""
    source, dtype = teacher.source, str(next(teacher.network.parameters()).dtype)
    parts = {name: mark(place) for name in ("vae", "scheduler") if (place := vars(source)[name]) is not None}
    loras = [[mark(lora.path), lora.weight] for lora in source.loras]
    given = {name: value for name in ("variant", "clip_skip", "quantization", "components_to_quantize",
                                      "negative_prompt", "guidance_rescale")
             if (value := vars(source)[name]) is not None}
    given |= {"loras": loras} if loras else {}
    given |= {} if teacher.resolution is None else {"resolution": list(teacher.resolution)}
    given |= {} if teacher.frames is None else {"frames": teacher.frames}
    return {"teacher": mark(source.place), "revision": source.revision, "dtype": dtype} | parts | given
