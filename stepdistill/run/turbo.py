"""Whether a pipeline is a few-step generator by itself, and how it is called."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import resources
from ..diffusion.draws import key
from ..diffusion.solvers import dpmpp_2m
from ..diffusion.times import even
from ..errors import RequestError
from ..export import read_settings
from ..export.folder import base_of, is_export
from ..models.denoiser import Denoiser
from ..models.families import FAMILIES
from ..models.sources import FusedLora, Source, class_at
from ..models.teacher import Teacher, load_teacher
from .folder import is_run
from .sources import located
from .targets import FEW, few_step_call, few_step_sign

FEW_STEP_SPREAD = 0.5                                # of `spread_at_once`, from which on a network is a few-step one
# noises of a prompt, and steps of the pictures that they are held against
NOISES, MANY = 8, 25


@dataclass(frozen=True)
class Turbo:
    """source: all that its weights and its scheduler are made of, as it was named. call: the keyword arguments of its
    few-step call. known: by what; None until it is `recognised`."""

    source: Source
    call: Mapping[str, Any]
    known: str | None

    @property
    def steps(self) -> int:
        return self.call["num_inference_steps"]


def turbo_of(name: str | Path, steps: int | None = None) -> Turbo:
    """The few-step generator at `name`: an export, whose file says its call; or a pipeline that is said to be one by
    `steps`, or shows it by its scheduler, or is yet to be recognised. No weights are read.

    steps: of its call, under its own scheduler and without guidance, where no file records it; 4 unless given.
    RequestError for a run, and for a network that carries no LoRA of ours.
    """
    found = resources.locate(str(name))
    if found is not None and is_run(found):
        raise RequestError(f"{name} is a run; what leaves of it can be undistilled: `stepdistill export {name}`, "
                           "and name the folder that it writes")
    if found is not None and is_export(found):
        if steps is not None:
            raise RequestError(f"--steps {steps}: {name} is an export, whose {read_settings(found)['steps']} steps "
                               "are recorded: leave it out")
        return _exported(str(name), found)
    source = Source.of(name)
    if (kind := class_at(located(source))) not in FAMILIES:
        raise RequestError(f"{name} is a {kind}, whose network no family of stepdistill knows how to train: "
                           "docs/families.md lists them")
    teacher = load_teacher(located(source), device="meta")
    if teacher.family.no_pipeline:
        raise RequestError(f"{name} is Toy, whose network carries no LoRA: name a diffusers pipeline")
    call = {**teacher.call, **few_step_call(teacher.guidance, kind), "num_inference_steps": steps or FEW}
    sign = few_step_sign(teacher.scheduler)
    return Turbo(source, call, f"it has {sign}" if sign else None if steps is None else "--steps says so")


def recognised(found: Turbo, prompts: Sequence[str]) -> Turbo:
    """The same, known by what its network does at pure noise where nothing else says it. prompts: with which it is
    looked at. RequestError for what is no few-step generator, with its figure."""
    if found.known is not None:
        return found
    spread = spread_at_once(load_teacher(located(found.source)), prompts)
    said = (f"at pure noise its network's pictures of a prompt differ from noise to noise by {spread:.2f} of what "
            "finished ones do")
    if spread < FEW_STEP_SPREAD:
        raise RequestError(f"{found.source} is no few-step model: {said}, and a few-step model's by {FEW_STEP_SPREAD} "
                           "or more: there is nothing to undistil, and a LoRA is trained on it as it is. If it "
                           "is one all the same, say in how many steps: --steps 4")
    return replace(found, known=said)


def _exported(name: str, folder: Path) -> Turbo:
    """A LoRA is fused into its base, whose scheduler gives way to the LoRA's."""
    settings = read_settings(folder)
    known = f"its stepdistill.json says that it was made by {settings['method']} for {settings['steps']} steps"
    if settings["format"] == "pipeline":
        return Turbo(Source(name), settings["call"], known)
    base = base_of(settings)
    lora = FusedLora(f"{name}/{settings['weights']}")
    return Turbo(replace(base, loras=(*base.loras, lora), scheduler=f"{name}/scheduler"), settings["call"], known)


@torch.no_grad()
def spread_at_once(teacher: Teacher, prompts: Sequence[str]) -> float:
    """The deviation of the network's x_0 at t = 1 over the noises of a prompt, over that of its samples in many steps.

    At pure noise a network that was trained to denoise can say no more than the mean of all pictures of its prompt,
    whatever the noise; one that was made for few steps says a picture, and for each noise another. Of a discrete
    schedule t = 1 holds a trace of the picture, so that the first is above 0.
    """
    role = Denoiser(teacher, teacher.network)
    cond = teacher.encode([prompt for prompt in prompts for _ in range(NOISES)])
    noise = torch.stack([torch.randn(teacher.latent_shape, generator=torch.Generator().manual_seed(key(0, "spread", i)))
                         for i in range(len(prompts) * NOISES)]).to(teacher.device)
    at_once = role(noise, torch.ones(len(noise), dtype=torch.float64), cond).x0
    finished = dpmpp_2m(role, noise, even(MANY), cond)
    return (_spread(at_once) / _spread(finished)).item()


def _spread(x: Tensor) -> Tensor:
    """Of samples of several prompts, NOISES of each after one another: (P NOISES, ...) -> a scalar."""
    return x.unflatten(0, (-1, NOISES)).var(1).mean().sqrt()
