"""Real teachers: what they are told of a prompt and of none, how they are guided, and the pairs that they make."""
from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from .. import resources
from ..diffusion.guidance import guided
from ..methods.base import Follows, Frozen
from ..models.roles import Roles, build_roles
from ..models.sources import absent_parts, index_at
from ..models.teacher import Teacher, load_teacher
from ..recipe import Recipe
from ..recipe.catalogue import builtin
from ..run.data import dataset
from ..run.setup import setup
from .problem import Check, difference, largest

PROMPTS = ["a red ring left of a blue square", "a green cross"]
TIMES = (1.0, 0.4)


def teachers(method: str) -> list[str]:
    """Of its shipped recipes, the pipelines that ship too."""
    names = [name for name, path in builtin().items()
             if name.startswith("shapes") and path.stem.split("-")[0] == method]
    return sorted({Recipe.load(name).teacher.base for name in names})


def encoded(pipeline: DiffusionPipeline, teacher: Teacher) -> list[Tensor]:
    """The stock encoding of PROMPTS and of the negative prompt that nobody gave: text and its null, and where the
    pipeline has them pooled and its null. With what every call of this pipeline says of prompts."""
    others = {"prompt_2": None, "prompt_3": None} if isinstance(pipeline, StableDiffusion3Pipeline) else {}
    takes = inspect.signature(pipeline.encode_prompt).parameters
    others |= {name: value for name, value in teacher.call.items() if name in takes}
    return list(pipeline.encode_prompt(PROMPTS, **others, device="cpu", num_images_per_prompt=1,
                                       do_classifier_free_guidance=True))


def stock_output(pipeline: DiffusionPipeline, x: Tensor, t: float, text: Tensor, pooled: Tensor | None) -> Tensor:
    """The stock network's answer, in the units of time in which a stock scheduler tells it."""
    if pooled is not None:
        return pipeline.transformer(x, timestep=torch.full((len(x),), 1000 * t), encoder_hidden_states=text,
                                    pooled_projections=pooled).sample
    return pipeline.unet(x, torch.tensor(round(1000 * t) - 1), encoder_hidden_states=text).sample


@torch.no_grad()
def conditions(teacher: Teacher, seed: int) -> Iterator[Check]:
    name = teacher.source.place.rsplit("/", 1)[-1]
    pipeline = stock_of(teacher)
    text, null, *pools = encoded(pipeline, teacher)
    pooled, pooled_null = pools or (None, None)
    cond = teacher.encode(PROMPTS)
    pairs = [(cond.text, text), (cond.null.text, null)]
    pairs += [(cond.pooled, pooled), (cond.null.pooled, pooled_null)] if pools else []
    yield Check(f"{name}: prompts, and the null prompt, against what the stock pipeline encodes; relative",
                largest(*(difference(found, known) for found, known in pairs)), 1e-5)
    role = build_roles(teacher, {"teacher": Frozen()}, {})["teacher"]
    x, w = torch.randn(len(PROMPTS), *teacher.latent_shape, generator=torch.Generator().manual_seed(seed)), 2.5
    away = []
    for t in TIMES:
        without, given = (stock_output(pipeline, x, t, *condition)
                          for condition in ((null, pooled_null), (text, pooled)))
        found = guided(role, w)(x, torch.full((len(x),), t, dtype=torch.float64), cond).raw
        away.append(difference(found, without + w * (given - without)))
    yield Check(f"{name}: the guided teacher against the stock network's two answers, mixed by hand; relative",
                largest(*away), 1e-4)


def stock_teachers(method: str, seed: int) -> Iterator[Check]:
    for source in teachers(method):
        yield from conditions(load_teacher(resources.pipeline(source)), seed)


@torch.no_grad()
def decays(recipe: Recipe, roles: Roles) -> Iterator[Check]:
    """Of the way to a student that has moved by 1, what follows it keeps its decay, the recipe's or the settings'."""
    known = {"ema": recipe.train.ema, "target": vars(recipe.method_settings()).get("target_decay")}
    student = roles.parameters("student")
    for parameter in student:
        parameter.add_(1.0)
    followers = {name: roles.parameters(name) for name, need in roles.needs.items()
                 if isinstance(need, Follows) and need.leader == "student" and need.moves}
    before = {name: [s - f for s, f in zip(student, own)] for name, own in followers.items()}
    roles.follow("student")
    off = [((s - f) / way - known[name]).abs().max().item()
           for name, own in followers.items() for s, f, way in zip(student, own, before[name])]
    names = " and ".join(followers) or "nothing"
    yield Check(f"share of the way to the student that {names} keeps in an update, against the decay",
                largest(0.0, *off), 1e-4)


@torch.no_grad()
def kept_pairs(recipe: Recipe) -> Iterator[Check]:
    """Where the data are pairs: a way of one step under a range of scales, by the stock network's answers."""
    plain = recipe.resolved()
    if plain["data"]["pairs"] is None:
        return
    low, high = 1.5, 3.5
    plain["data"]["pairs"] |= {"steps": 1, "nodes": 1}
    run = setup(Recipe.load(plain | {"steps": 1, "guidance": [low, high]}), torch.device("cpu"))
    pipeline, kept, ids = stock_of(run.teacher), dataset(run), torch.arange(2)
    (x0, cond), pairs = kept[ids], kept.pairs(ids)
    without, given = (stock_output(pipeline, pairs.noise, 1.0, condition.text, condition.pooled)
                      for condition in (cond.null, cond))
    raw = without + (low + high) / 2 * (given - without)
    picture = clean(pipeline, pairs.noise, raw)
    yield Check("kept pictures of one step against the stock network's at the middle of a range of scales; relative",
                largest(*(difference(found, picture) for found in (x0, pairs.nodes[:, -1]))), 1e-4)


def clean(pipeline: DiffusionPipeline, x: Tensor, raw: Tensor) -> Tensor:
    """x_0 of a stock network's answer at the noisiest time."""
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return x - raw
    a, s = pipeline.scheduler.alphas_cumprod[-1] ** 0.5, (1 - pipeline.scheduler.alphas_cumprod[-1]) ** 0.5
    pictures = {"epsilon": (x - s * raw) / a, "v_prediction": a * x - s * raw, "sample": raw}
    return pictures[pipeline.scheduler.config.prediction_type]


def stock_of(teacher: Teacher) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(teacher.source.place,
                                             **absent_parts(index_at(teacher.source))).to(torch.float32)
