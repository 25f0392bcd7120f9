"""The proof of an export: a fresh stock pipeline, called as the folder says, gives our sampler's images."""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..diffusion.guidance import guided
from ..diffusion.sampler import Sampler
from ..errors import RequestError
from .folder import fuse, open_export, read_settings
from .formats import component
from .student import Lora, Student

IMAGES, SEED, TOLERANCE = 4, 0, 1e-4


@dataclass(frozen=True)
class Proof:
    """images: (B, 3, H, W) in [0, 1] of the stock pipeline; difference: max abs against our sampler's."""

    images: Tensor
    difference: float


@torch.no_grad()
def prove(student: Student, folder: Path, lora: Lora | None, guidance: float | None) -> Proof:
    """Reloads `folder` into the teacher's stock pipeline and compares keys, values and pixels (float32, CPU).

    lora: the adapter that was to be written, None for a pipeline; guidance: the scale that a told student is told.
    Both sides draw from one seeded generator in the same order: first the latents, then the noise of each step, which some
    pipelines take from the global generator.
    RequestError if a key is missing or unexpected, or a pixel differs by more than 1e-4; by as much may those of a LoRA that is
    fused differ from those of one that is not.
    """
    said = read_settings(folder)
    pipe, call = open_export(folder, student.family.source, fused=False)
    if lora is not None:
        _same_adapter(pipe, lora)
    if "safety_checker" in pipe.components:
        pipe.safety_checker = None                          # it would paint both sides' doubtful images black
    prompts = list(islice(cycle(student.prompts), IMAGES))
    stock = _called(pipe, prompts, call)
    ours = reference(student, pipe, call, prompts, guidance)
    difference = (stock - ours).abs().max().item()
    if not difference <= TOLERANCE:
        raise RequestError(f"the export was refused: the stock {type(pipe).__name__} with {said['scheduler']} and {call} "
                           f"differs from this run's own sampler by {difference:.2e} (mean {(stock - ours).abs().mean():.2e}) "
                           f"on [0, 1] pixels, where {TOLERANCE:.0e} is allowed; nothing was written")
    if lora is not None:
        fuse(pipe)
        apart = (_called(pipe, prompts, call) - stock).abs().max().item()
        if not apart <= TOLERANCE:
            raise RequestError(f"the export was refused: with the LoRA fused, as in the card's snippet, the stock "
                               f"{type(pipe).__name__} differs from itself by {apart:.2e} on [0, 1] pixels, where "
                               f"{TOLERANCE:.0e} is allowed; nothing was written")
    return Proof(stock, difference)


def _called(pipe: DiffusionPipeline, prompts: list[str], call: Mapping[str, Any]) -> Tensor:
    """The stock pipeline's images for the seed of the proof: (B, 3, H, W) in [0, 1]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return pipe(prompts, generator=torch.Generator().manual_seed(SEED), output_type="pt", **call).images


def reference(student: Student, pipe: DiffusionPipeline, call: Mapping[str, Any], prompts: list[str],
              guidance: float | None) -> Tensor:
    """Our sampler's images for the seed of the proof: (B, 3, H, W) in [0, 1]."""
    family, generator = student.family, torch.Generator().manual_seed(SEED)
    sampler = Sampler.of_call(pipe.scheduler, student.steps, family.schedule, call)
    shape = (len(prompts), *family.latent_shape)
    noise = torch.randn(shape, generator=generator)
    if not family.seeded_steps:
        generator = torch.Generator().manual_seed(SEED)
    cond, role = family.encode(prompts), student.role
    if student.told:
        cond = cond.replace(w=torch.full((len(prompts),), guidance, dtype=torch.float64))
    else:
        role = guided(role, max(1.0, call["guidance_scale"]))       # stock pipelines guide above 1 only
    latents = sampler(role, noise, cond, lambda i: torch.randn(shape, generator=generator))
    return (family.decode(latents) / 2 + 0.5).clamp(0, 1)


def _same_adapter(pipe: DiffusionPipeline, lora: Lora) -> None:
    """The loaded adapter holds exactly the written keys and values."""
    loaded = {re.sub(r"\.lora_([AB])\.[^.]+\.", r".lora_\1.", key): value
              for key, value in pipe.components[component(pipe)].state_dict().items() if ".lora_" in key}
    wrong = {"missing": sorted(lora.state.keys() - loaded.keys()), "unexpected": sorted(loaded.keys() - lora.state.keys()),
             "changed": sorted(key for key in lora.state.keys() & loaded.keys() if not torch.equal(lora.state[key], loaded[key]))}
    found = "; ".join(f"{len(keys)} {name}, first {keys[0]}" for name, keys in wrong.items() if keys)
    if found:
        raise RequestError(f"the export was refused: {type(pipe).__name__} reloaded the LoRA with keys {found}; nothing was written")
