"""What a run will cost: the same setup with networks on the meta device, where they have shapes and no bytes."""
from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from .. import resources
from ..methods.base import Heads, Reward, Trained
from ..models.quantized import HEAD, packed_bytes, saved_as
from ..models.rewards import where
from ..models.sources import cached_file, config_folder
from ..models.teacher import Teacher
from ..recipe import Recipe
from .buckets import at_largest
from .checks import vision_network
from .passes import count_passes, tensors_in
from .rewards import reward_name
from .setup import Previous, Run, setup, student_weights
from .teacher_checks import family

GRADIENT, FLOAT = 4, 4                # bytes a trained parameter: its gradient, itself
ADAM = {"adamw": 8, "adamw8bit": 2}   # its two moments
LIBRARIES = 600_000_000               # bytes that torch, diffusers and transformers hold before any network
META = torch.device("meta")


def plan(recipe: Recipe) -> dict[str, Any]:
    """{roles: {name: {parameters, trained, bytes}}, bytes, over_base, peak, passes, disk, downloads}; bytes as plain
    numbers.

    bytes: of all weights; over_base: those of the denoiser and of all roles on it, by its own; peak: with gradients,
    optimizers and activations, an estimate, of buckets at the largest. No weights are read. Of several stages roles,
    bytes and peak are those of the largest, passes a mean over all their steps, disk the sum, and `stages` has each.
    RequestError for what training would refuse.
    """
    found: list[dict[str, Any]] = []
    previous: Previous | None = None
    for stage in recipe.stages:
        if family(stage).no_pipeline:
            raise stage.refuse("teacher", f"is {stage.teacher.base}, a Toy, which there is nothing to plan of: "
                                          "its recipes train within a "
                               "minute, by `stepdistill train`; plans are made of pipelines, such as assets/shapes-sd")
        run = setup(at_largest(stage, family(stage)), META, previous=previous, attention="auto")
        found.append(_stage(run))
        previous = Previous(student_weights(stage, run.roles.state_dict(run.sampling_role)), "")
    if len(found) == 1:
        return found[0]
    passes = [row["passes"] for row in found]
    updates, samples = sum(p["updates"] for p in passes), sum(p["updates"] * p["batch"] for p in passes)
    mean = {name: _short(sum(p[name] * p["updates"] * p["batch"] for p in passes) / samples)
            for name in ("forward", "backward")}
    each = [{"method": stage.method, "steps": stage.steps, **row}
            for stage, row in zip(recipe.stages, found, strict=True)]
    return max(found, key=lambda row: row["peak"]) | {
        "disk": sum(row["disk"] for row in found), "stages": each,
        "passes": mean | {"batch": _short(samples / updates), "updates": updates}}


def _stage(run: Run) -> dict[str, Any]:
    rows, train = _rows(run), run.recipe.train
    weights, trained = (sum(row[name] for row in rows.values()) for name in ("bytes", "trained"))
    disk, counts = _disk(run, rows), count_passes(run)
    passes = {"forward": _short(counts.forward), "backward": _short(counts.backward), "batch": run.recipe.data.batch,
              "updates": train.updates}
    peak = LIBRARIES + weights + trained * (GRADIENT + ADAM[train.optimizer]) + counts.held
    base, own = rows[_base(run)]["bytes"], {*run.roles.needs} - {_base(run)}
    over = 1 + sum(row["bytes"] for name, row in rows.items() if name in own) / base
    return {"roles": rows, "bytes": weights, "over_base": _short(over), "peak": peak, "passes": passes, "disk": disk,
            "downloads": _downloads(run, rows)}


def _base(run: Run) -> str:
    """The row of the frozen denoiser; "teacher" is a role on it, where that is the student of the stage before."""
    return "base" if run.recipe.taught_by_previous else "teacher"


def _rows(run: Run) -> dict[str, dict[str, int]]:
    """A row for each network of the pipeline, and for each role that has weights of its own."""
    teacher, roles = run.teacher, run.roles
    rows = {_base(run) if name == teacher.family.denoiser
            else name: {"parameters": size, "trained": 0, "bytes": _bytes(teacher, name)}
            for name, size in teacher.sizes.items()}
    for name, need in roles.needs.items():
        own = list(roles.visions[name].parameters()) if name in roles.visions else roles.parameters(name)
        if count := sum(parameter.numel() for parameter in own):
            trained = count if isinstance(need, Trained | Heads) else 0
            rows[name] = {"parameters": count, "trained": trained, "bytes": count * FLOAT}
    return rows


def _short(count: float) -> float:
    """To three digits after the point, none where it is whole."""
    return int(near) if (near := round(count, 3)).is_integer() else near


def _bytes(teacher: Teacher, name: str) -> int:
    """Of the weights of a pipeline's network."""
    size, width, source, denoiser = (teacher.sizes[name], _width(teacher.parts[name]), teacher.source,
                                     teacher.family.denoiser)
    folder = config_folder(source, name)
    saved = None if folder is None else saved_as(folder)
    kind = source.quantization if name in (source.components_to_quantize or (denoiser,)) else saved
    if kind is None:
        return size * width
    count, held = packed_bytes(teacher.parts[name], kind, teacher.family.time.first if name == denoiser else HEAD)
    return (size - count) * width + held


def _width(network: nn.Module) -> int:
    """Bytes of one of its own weights; adapters on it are float32."""
    return min(parameter.dtype.itemsize for parameter in network.parameters())


# -- disk and net ------------------------------------------------------------------------------------------------------

def _disk(run: Run, rows: Mapping[str, Mapping[str, int]]) -> int:
    """Bytes of checkpoints (every role and both moments), the export, and the cache, unless an earlier stage has filled
    it."""
    train, data, earlier = run.recipe.train, run.recipe.data, run.recipe.stages[:-1]
    roles = [row for name, row in rows.items() if name in run.roles.needs and name != "teacher"]
    each = sum(row["bytes"] + row["trained"] * ADAM[train.optimizer] for row in roles)
    checkpoints = -(-train.updates // (train.checkpoint_every or train.updates))
    cond = run.teacher.encode([run.teacher.null_prompt]).replace(null=None)
    latents = prod(run.teacher.latent_shape) * (1 if data.pairs is None else 1 + data.pairs.nodes)
    sample = FLOAT * (latents + sum(tensor.numel() for tensor in tensors_in(vars(cond).values())))
    same = any(stage.data.model_dump(exclude={"batch"}) == data.model_dump(exclude={"batch"}) for stage in earlier)
    cached = data.count * (1 + data.flip) if data.count and (data.cache or data.made is not None) and not same else 0
    return checkpoints * each + rows["student"]["bytes"] + cached * sample


def _downloads(run: Run, rows: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Hub networks whose weights are not in the cache yet: the teacher, and what sees pictures for a discriminator or
    as a reward."""
    source, found = run.teacher.source, []
    whole = f"{run.teacher.family.denoiser}/diffusion_pytorch_model.safetensors"
    if not _here(source.place, source.revision, whole, f"{whole}.index.json"):
        size = sum(row["parameters"] for row in rows.values() if row["trained"] == 0) * FLOAT
        found.append(f"{source} (up to {size / 1e9:.1f} GB)")
    for name in run.roles.visions:
        judge = isinstance(run.roles.needs[name], Reward)
        place = where(reward_name(run.recipe))[1] if judge else vision_network(run.recipe).source
        if not _here(place, None, "model.safetensors"):
            found.append(f"{place} (up to {rows[name]['bytes'] / 1e9:.1f} GB)")
    return found


def _here(source: str, revision: str | None, *files: str) -> bool:
    return resources.locate(source) is not None or any(cached_file(source, file, revision) for file in files)
