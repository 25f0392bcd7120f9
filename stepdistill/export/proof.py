"""The proof of an export: a fresh stock pipeline, called as the folder says, gives our sampler's images."""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.guidance import guided
from ..diffusion.sampler import Sampler
from ..errors import RequestError
from ..models.stock import pictures
from ..models.teacher import Teacher
from .folder import fuse, open_export, read_settings
from .formats import component
from .student import Lora, Student

IMAGES, VIDEOS, SEED, TOLERANCE = 4, 1, 0, 1e-4      # samples of a proof, of which one video has many pictures
COARSE = 2**-5                        # of pixels in [0, 1]: numbers of 16 bits hold eight digits, and roundings add up


@dataclass(frozen=True)
class Proof:
    """images: (B, 3, H, W) in [0, 1] of the stock pipeline, of videos (B, F, 3, H, W); difference: max abs against our
    sampler's, at every size; sizes: height and width of those at which it was proved."""

    images: Tensor
    difference: float
    sizes: tuple[tuple[int, int], ...]


@torch.no_grad()
def prove(student: Student, folder: Path, guidance: float | None) -> Proof:
    """Reloads `folder` into the teacher's stock pipeline and compares keys, values and pixels (float32, CPU).

    student: with the values that were written, as `prepare.prepare` makes it; its `lora` is None for a pipeline.
    guidance: the scale that a student's guidance embedding reads. Both sides draw from one seeded generator in the same
    order: first the latents, then the noise of each step, which some pipelines take from the global generator. A
    student of buckets is compared at two of them, whose aspects are farthest apart from the first. RequestError if a
    key is missing or unexpected, or a pixel differs by more than `tolerance`; by as much may those of a LoRA that is
    fused differ from those of one that is not.
    """
    settings = read_settings(folder)
    pipe, call = open_export(folder, student.teacher.source, fused=False)
    if student.lora is not None:
        _same_adapter(pipe, student.lora)
    if "safety_checker" in pipe.components:
        pipe.safety_checker = None                          # it would paint both sides' doubtful images black
    shown, differences, named = [], [], f"the stock {type(pipe).__name__} with {settings['scheduler']} and"
    for view in student.views:
        asked = {**call, **view.teacher.call}
        shown.append(_called(pipe, view, asked))
        differences.append(within(shown[-1], reference(view, pipe.scheduler, asked, guidance),
                                  f"{named} {asked}", tolerance(student.teacher)))
        if student.negative is not None:
            differences.append(_prove_negative(pipe, view, asked, shown[-1], named))
    if student.lora is not None and student.teacher.source.quantization is None:
        fuse(pipe)
        within(_called(pipe, student, call), shown[0], "with the LoRA fused, as in the card's snippet, the "
               "stock pipeline")
    return Proof(shown[0], max(differences), tuple((images.shape[-2], images.shape[-1]) for images in shown))


def _prove_negative(pipe: DiffusionPipeline, student: Student, call: Mapping[str, Any], without: Tensor,
                    named: str) -> float:
    """The difference of the stock pipeline with a negative prompt from our sampler with it. RequestError where it does
    nothing."""
    asked = {**call, "negative_prompt": student.negative}
    drawn = _called(pipe, student, asked)
    if torch.equal(drawn, without):
        raise RequestError(f"the export was refused: {named} {asked} draws what it does without a negative prompt; "
                           "nothing was written")
    return within(drawn, reference(student, pipe.scheduler, call, None, student.negative), f"{named} {asked}",
                  tolerance(student.teacher))


def samples(teacher: Teacher) -> int:
    """Of how many samples a proof is made."""
    return IMAGES if teacher.family.video is None else VIDEOS


def tolerance(teacher: Teacher) -> float:
    """How far two samplers of a float32 teacher may be apart, on [0, 1] pixels. Layers of int8 round their inputs,
    where the last digit of a number decides."""
    return TOLERANCE if teacher.source.quantization in (None, "nf4") else COARSE


def _called(pipe: DiffusionPipeline, student: Student, call: Mapping[str, Any]) -> Tensor:
    """The stock pipeline's images for the seed of the proof: (B, 3, H, W) in [0, 1]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return pictures(pipe, student.teacher.family.prompts, _prompts(student),
                        generator=torch.Generator().manual_seed(SEED), **call)


def within(images: Tensor, ours: Tensor, what: str, limit: float = TOLERANCE) -> float:
    """The largest difference of two sets of images in [0, 1]. RequestError if it is above the limit."""
    difference = (images - ours).abs().max().item()
    if not difference <= limit:
        raise RequestError(f"the export was refused: {what} differs from this run's own sampler by {difference:.2e} "
                           f"(mean {(images - ours).abs().mean():.2e}) on [0, 1] pixels, where {limit:.0e} is "
                           "allowed; nothing was written")
    return difference


@torch.no_grad()
def reference(student: Student, scheduler: SchedulerMixin, call: Mapping[str, Any], guidance: float | None,
              negative: str | None = None) -> Tensor:
    """Our sampler's images for the prompts and the seed of the proof: (B, 3, H, W) in [0, 1]. negative: what they are
    drawn away from in place of the null."""
    teacher, prompts = student.teacher, _prompts(student)
    sampler = Sampler.of_call(scheduler, student.steps, teacher.schedule, call)
    cond, role = teacher.encode(prompts), student.role
    if negative is not None:
        cond = cond.replace(negative=teacher.encode([negative] * len(prompts), negative=True).replace(null=None))
    if "r" in student.reads:
        role = sampler.telling(role)
    if student.guidance_embedding:
        cond = cond.replace(w=torch.full((len(prompts),), guidance, dtype=torch.float64))
    elif teacher.scale is None:
        role = guided(role, teacher.guidance.scale(call))
    return sampled(teacher, sampler, role, cond)


@torch.no_grad()
def sampled(teacher: Teacher, sampler: Sampler, role: Role, cond: Condition) -> Tensor:
    """Our sampler's images from the numbers that the stock pipeline draws for the seed of the proof: (B, 3, H, W) in
    [0, 1], on the CPU. It draws the start in the precision of its text, or in one of its own, and each step's noise
    from the same generator or the global one."""
    shape = (len(cond), *teacher.latent_shape)
    told = (tensor.dtype for tensor in cond.tensors() if tensor.is_floating_point())
    dtype = teacher.family.noise_dtype or next(told, teacher.dtype)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(shape, generator=generator, dtype=dtype).to(teacher.device)
    if not teacher.family.seeded_steps:
        generator = torch.Generator(teacher.device).manual_seed(SEED)
    draw = lambda i: teacher.family.step_noise(shape, generator, dtype).to(teacher.device)
    return (teacher.decode(sampler(role, noise, cond, draw)) / 2 + 0.5).clamp(0, 1).cpu()


def _prompts(student: Student) -> list[str]:
    return list(islice(cycle(student.prompts), samples(student.teacher)))


def _same_adapter(pipe: DiffusionPipeline, lora: Lora) -> None:
    """The loaded adapter holds exactly the written keys and values, in float32."""
    loaded = {re.sub(r"\.lora_([AB])\.[^.]+\.", r".lora_\1.", key): value
              for key, value in pipe.components[component(pipe)].state_dict().items() if ".lora_" in key}
    written = {key: value.float() for key, value in lora.state.items()}
    wrong = {"missing": sorted(written.keys() - loaded.keys()), "unexpected": sorted(loaded.keys() - written.keys()),
             "changed": sorted(key for key in written.keys() & loaded.keys()
                               if not torch.equal(written[key], loaded[key]))}
    found = "; ".join(f"{len(keys)} {name}, first {keys[0]}" for name, keys in wrong.items() if keys)
    if found:
        raise RequestError(f"the export was refused: {type(pipe).__name__} reloaded the LoRA with keys {found}; "
                           "nothing was written")
