"""The adapter that gives a few-step model its many steps back, so that a LoRA of a style can be trained on it: what is
trained for it, and the card that says how it is used."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import resources
from ..data.prompts import open_prompts
from ..errors import RequestError, redacted
from ..export import check as check_export
from ..export import read_settings
from ..export.card import base_lines, block, code, front_matter, quoted
from ..export.folder import base_of
from ..export.layers import NAMES as TRANSFORMERS
from ..files.whole import write_whole
from ..models.adapters import PEFT_WEIGHTS
from ..models.sources import class_at
from ..models.teacher import load_teacher
from ..recipe import Recipe
from .checks import check
from .sources import located
from .teacher_checks import family, quantization
from .telling import log
from .turbo import Turbo, recognised, turbo_of

# program that reads the adapter -> form of the export
TO = {"diffusers": "lora", "kohya": "comfyui", "ai-toolkit": "lora"}
# whose adapters its assistant_lora_path reads: diffusers' keys, alpha = rank
AI_TOOLKIT = ("FluxPipeline", "ZImagePipeline")
LOOKED_WITH = 2                                     # prompts with which a network is looked at
MANY = 25                                           # steps of the previews, and of the adapter's own pictures
TRAIN = {"lr": 1e-4, "warmup": 20, "checkpoint_every": 100, "keep": 2, "gradient_checkpointing": True}


def undistilling(turbo: str | Path, prompts: str | Path | Sequence[str] | None, updates: int, samples: int, rank: int,
                 steps: int | None, to: str, overrides: Mapping[str, Any]) -> tuple[Turbo, Recipe]:
    """The few-step model, and the recipe that trains its adapter: plain denoising of its own few-step samples.

    RequestError, before anything is trained, for what is no few-step model, for a text model without prompts, for an
    adapter that could not leave as `to`, and for overrides that would make another thing of it; all but the first
    before any weights are read.
    """
    if to not in TO:
        raise RequestError(f"--to {to}: an adapter is written for {', '.join(TO)}")
    found = turbo_of(turbo, steps)
    if to == "ai-toolkit" and (kind := class_at(located(found.source))) not in AI_TOOLKIT:
        raise RequestError(f"--to ai-toolkit: it reads adapters of {' and '.join(AI_TOOLKIT)}, and this is a {kind}: "
                           "use --to diffusers, and train on the model that the adapter's card saves")
    asked = _prompts(found, prompts)
    first, table = _first(asked), {
        "method": "denoise", "teacher": _teacher(found), "student": {"lora": {"rank": rank}}, "steps": MANY,
        "data": {"samples": {"prompts": asked, "solver": "own", "call": dict(found.call)}, "count": samples, "batch": 4,
                 "caption_dropout": 0.1},
        "train": {"updates": updates, "precision": _precision(), **TRAIN}}
    recipe = Recipe.load(table, overrides)
    _check_kept(recipe, Recipe.load(table))
    check_export(TO[to], None, family(recipe), (), True, 1.0, quantization(recipe))
    if to == "kohya" and family(recipe).name in TRANSFORMERS:
        raise RequestError(f"--to kohya: kohya's LoRA keys are written for UNets, and this is {family(recipe).name}, "
                           "whose layers its scripts name otherwise: use --to diffusers")
    check(recipe)
    found = recognised(found, first)
    log.info(f"{turbo} is a few-step model: {found.known}. Its samples are made by {dict(found.call)}")
    return found, recipe


def _check_kept(recipe: Recipe, plain: Recipe) -> None:
    """RequestError for overrides that train something else than the adapter, whose card would not be its own. plain:
    without them."""
    kept = {"method": recipe.method == plain.method, "stages": recipe.previous is None,
            "teacher": all(vars(recipe.teacher)[name] == vars(plain.teacher)[name]
                           for name in ("base", "loras", "scheduler")), "student": recipe.student.lora is not None,
            "data": recipe.data.samples == plain.data.samples}
    if changed := [name for name, same in kept.items() if not same]:
        raise recipe.refuse(changed[0], "is changed, but an adapter is a LoRA on the few-step model itself, trained "
                            "by denoise, in one stage, on samples of its own call: leave it out, and let `stepdistill "
                            "train` make other things")


def _prompts(found: Turbo, asked: str | Path | Sequence[str] | None) -> str | list[str]:
    """As a recipe names them. RequestError for a model that is told something, and no prompts."""
    if asked is not None and str(asked) != "none":
        return str(asked) if isinstance(asked, str | Path) else list(asked)
    teacher = load_teacher(located(found.source), device="meta")
    if (reads := teacher.family.reads(teacher.network)) != "nothing":
        raise RequestError(f"{found.source} reads {reads}, and its samples are made of some: give --prompts, a "
                           ".txt file of one a line, of the kind that your pictures will have")
    return "none"


def _first(prompts: str | list[str]) -> list[str]:
    place = resources.locate(prompts) if isinstance(prompts, str) and prompts not in ("shapes", "none") else None
    opened = open_prompts(prompts if place is None else str(place))
    return opened.captions(torch.arange(LOOKED_WITH if opened.count is None else min(LOOKED_WITH, opened.count)))


def _teacher(found: Turbo) -> dict[str, Any]:
    """As a recipe names it."""
    given = {name: value for name, value in vars(found.source).items() if value is not None and name != "loras"}
    return given | {"loras": [{"path": lora.path, "weight": lora.weight} for lora in found.source.loras]}


def _precision() -> str:
    """bf16 where the card has it."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


# -- the card ----------------------------------------------------------------------------------------------------------

TRAINERS = {
    "diffusers": "A recipe of `method: denoise` names it under `teacher`, and your pictures under `data`:\n\n{recipe}",
    "kohya": "kohya's sd-scripts merge it before your LoRA is trained: {file} after `--base_weights`, with "
    "`--base_weights_multiplier 1`.",
    "ai-toolkit": "ai-toolkit takes {file} as `assistant_lora_path` under `model:` of its config: on in training, and "
    "off in the samples.",
}


def write_card(folder: Path, found: Turbo, to: str, recipe: Recipe) -> None:
    """README.md of an exported adapter, in place of that of a few-step student, which it is not."""
    write_whole(folder / "README.md", card(read_settings(folder), found, to, recipe, folder).encode())


def card(settings: Mapping[str, Any], found: Turbo, to: str, recipe: Recipe, folder: Path) -> str:
    """settings: the adapter's stepdistill.json; folder: where it lies."""
    file, data = (folder / settings["weights"]).as_posix(), recipe.data
    turbo = code(settings["teacher"]) + "".join(f" with {code(lora['path'])}"
                                                for lora in settings.get("teacher_loras", []))
    call = ", ".join(code(f"{name}={value!r}") for name, value in found.call.items())
    parts = [
        front_matter(settings), "# Training adapter",
        f"With it {turbo}, a model of {found.steps} step{'s' * (found.steps != 1)}, denoises as one of many steps "
        "does. A LoRA of a style or a subject that is trained with it on does not unlearn the few steps, and **is "
        f"sampled with it off**. It was made by stepdistill, by plain denoising of {data.count:,} of the model's "
        f"own samples, in {recipe.train.updates:,} updates of {data.batch}.",
        "![the model with it, in many steps](samples.png)",
        "## Train with it", TRAINERS[to].format(file=code(file), recipe=block(_recipe(settings, file), "yaml"))]
    if "quantization" not in settings:
        parts += ["Any other trainer takes the model with the adapter in its weights, which this saves:",
                  block(fusing(settings, folder))]
    return redacted("\n\n".join([
        *parts, "## Sample without it", f"Load your LoRA on {turbo}, under the scheduler that this model always had, "
        f"and call it by {call}."])) + "\n"


def _recipe(settings: Mapping[str, Any], file: str) -> str:
    loras = "".join(f"    - {{path: {quoted(lora['path'])}, weight: {lora['weight']:g}}}\n"
                    for lora in settings.get("teacher_loras", []))
    base, own = quoted(settings["teacher"]), quoted(file)
    return (f"method: denoise\nteacher:\n  base: {base}\n  loras:\n{loras}    - {own}\n"
            f"steps: {MANY}\ndata: {{images: my-pictures, batch: 4, caption_dropout: 0.1}}\n"
            "train: {updates: 1000, lr: 1.0e-4}\n")


def fusing(settings: Mapping[str, Any], folder: Path) -> str:
    """Python that saves the few-step model with the adapter in its weights."""
    base, by_peft, denoiser = base_of(settings), settings["weights"] == PEFT_WEIGHTS, settings["denoiser"]
    names, place = ["AutoencoderKL"] * (base.vae is not None) + [settings["pipeline"]], quoted(folder.as_posix())
    without = "".join(f", {name}=None" for name in settings["without"])
    own = [f"pipe.load_lora_weights({place}, weight_name={quoted(settings['weights'])})", "pipe.fuse_lora()",
           "pipe.unload_lora_weights()"]
    if by_peft:
        own = [f"pipe.{denoiser} = PeftModel.from_pretrained(pipe.{denoiser}, {place}).merge_and_unload()"]
    return "\n".join([
        "import torch", f"from diffusers import {', '.join(names)}", *["from peft import PeftModel"] * by_peft, "",
        'device, dtype = "cpu", torch.float32', *base_lines(base, settings["pipeline"], without), *own,
        'pipe.save_pretrained("to-train-on")', ""])
