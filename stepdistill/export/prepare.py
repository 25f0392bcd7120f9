"""The student as it leaves: in one form, at one guidance scale, its weights rounded to one dtype."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..models.adapters import AdapterBank, LoraConfig
from ..models.denoiser import Denoiser
from ..models.teacher import Teacher, load_teacher
from .dtypes import round_pipeline_
from .formats import adapter, component, keeps
from .proof import reference, tolerance, within
from .student import Lora, Student


@dataclass(frozen=True)
class PreparedExport:
    """student: computes in float32 with the values that are written. Its `lora` is what is written; None: a pipeline.

    pipe: the stock pipeline that is written, or that writes the LoRA. unrounded: (B, 3, H, W) in [0, 1], the images of
    the proof as the student draws them before it is rounded; None where nothing is rounded.
    """

    student: Student
    pipe: DiffusionPipeline
    unrounded: Tensor | None


def prepare(student: Student, to: str, call: Mapping[str, Any], guidance: float | None,
            dtype: torch.dtype) -> PreparedExport:
    """`student` in the form `to`, with the values that its weights have in dtype.

    guidance: the scale of a student with a guidance embedding. RequestError where the form, before it is rounded, does
    not give the student's images to 1e-4, or where a weight is beyond the range of dtype.
    """
    if to == "pipeline":
        return _pipeline(student, call, guidance, dtype)
    pipe = student.teacher.pipeline()
    lora = adapter(to, student, call, guidance)
    if dtype == torch.float32:
        return PreparedExport(replace(student, lora=lora), pipe, None)
    unrounded = reference(student, student.scheduler, call, guidance)
    on_pipeline = _on_pipeline(student.teacher, pipe, lora)
    whole = _stock(student, on_pipeline, lora)
    within(reference(whole, student.scheduler, call, guidance), unrounded, f"the {to} before it is rounded",
           tolerance(student.teacher))
    lora = lora.rounded(dtype)
    on_pipeline.bank.load_state_dict("student", lora.state)
    return PreparedExport(_stock(student, on_pipeline, lora), pipe, unrounded)


def _pipeline(student: Student, call: Mapping[str, Any], guidance: float | None, dtype: torch.dtype) -> PreparedExport:
    network = student.network(student.sampler(call), guidance)
    reads = student.reads if keeps("pipeline", student.teacher.family, student.reads) else ()
    if dtype == torch.float32:
        return PreparedExport(replace(student, lora=None), student.teacher.pipeline(network, student.scheduler), None)
    unrounded = reference(student, student.scheduler, call, guidance)
    whole = replace(student, lora=None, role=Denoiser(student.teacher, network, reads=reads), reads=reads)
    within(reference(whole, student.scheduler, call, guidance), unrounded, "the pipeline before it is rounded")
    own = student.teacher                               # and one of its own is loaded: its codec is rounded too
    teacher = load_teacher(own.source, scale=own.scale or 1.0, resolution=own.resolution, frames=own.frames)
    pipe = teacher.pipeline(network, student.scheduler)
    round_pipeline_(pipe, dtype)
    return PreparedExport(replace(whole, teacher=teacher, role=Denoiser(teacher, network, reads=reads)),
                          pipe, unrounded)


@dataclass(frozen=True)
class _PipelineAdapter:
    role: Denoiser
    bank: AdapterBank


def _on_pipeline(teacher: Teacher, pipe: DiffusionPipeline, lora: Lora) -> _PipelineAdapter:
    """The adapter on the pipeline's own network, computed as a stock pipeline computes it."""
    network = pipe.components[component(pipe)]
    bank = AdapterBank(network, {"student": LoraConfig(**lora.metadata())})
    bank.load_state_dict("student", lora.state)
    return _PipelineAdapter(Denoiser(teacher, network, partial(bank.use, "student")), bank)


def _stock(student: Student, on_pipeline: _PipelineAdapter, lora: Lora) -> Student:
    """The student whose guidance scale, if it has a guidance embedding, is within the adapter."""
    return replace(student, role=on_pipeline.role, lora=lora, reads=(), layers={})
