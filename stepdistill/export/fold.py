"""A student that reads numbers beside its time, at fixed ones, as a stock LoRA."""
from __future__ import annotations

from ..diffusion.sampler import Sampler
from .student import Lora, Student


def folded(student: Student, sampler: Sampler, w: float | None) -> Lora:
    """The adapter of the same student for a stock network, which reads its time alone.

    The network computes W (s + c), with s the sinusoids of its time and c what its own layers add to them. A stock
    adapter could hold a constant as `lora_bias`, but peft gives every module of the adapter one, and cannot fuse those
    whose base has none, the attention projections; so W c is folded as a term of low rank, see
    `models.extra_embedding`. w: the guidance scale.
    """
    teacher, lora = student.teacher, student.lora
    module = teacher.family.time.first
    weight, key = teacher.network.get_submodule(module).weight.double(), f"{module}.lora_A.weight"
    if key in lora.state:
        weight = (weight + lora.scaling(module) * lora.state[f"{module}.lora_B.weight"].double()
                  @ lora.state[key].double())
    return lora.extended(module, *teacher.folded(student.layers, student.reads, weight, sampler, w))
