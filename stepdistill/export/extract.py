"""A LoRA from two checkpoints: what one differs from the other by, layer by layer, as a product of two thin
matrices."""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..diffusion.draws import key
from ..errors import RequestError, first_lines
from ..models.adapters import named_layers
from ..models.families import text_to_image
from ..models.quantized import saved_as
from ..models.sources import Source, check_safetensors, index_at
from ..models.teacher import Teacher, load_teacher
from ..models.weights import settled, weight_files
from .dtypes import DTYPES, chosen
from .formats import save_lora
from .student import Lora
from .write import aside, may_write_new

OVERSAMPLES, POWERS = 16, 6                        # of the randomised decomposition: Halko et al. 2011, arXiv:0909.4061
KINDS = ("norms", "biases", "embeddings", "other layers", "other numbers")


@dataclass(frozen=True)
class LayerEnergy:
    """Of one layer's difference: its squared norm, and the share of it that the LoRA holds."""

    name: str
    norm: float
    kept: float


@dataclass(frozen=True)
class Extracted:
    """A LoRA of the difference of two networks. layers: those that differ. beyond: what differs and no LoRA of these
    layers reaches, kind -> (tensors, squared norm)."""

    folder: Path
    rank: int
    layers: tuple[LayerEnergy, ...]
    beyond: Mapping[str, tuple[int, float]]

    @property
    def kept(self) -> float:
        """The share of the layers' squared difference that the LoRA holds."""
        return sum(layer.kept * layer.norm for layer in self.layers) / sum(layer.norm for layer in self.layers)

    @property
    def reached(self) -> float:
        """The share of the whole squared difference that lies in these layers."""
        within = sum(layer.norm for layer in self.layers)
        return within / (within + sum(norm for _, norm in self.beyond.values()))

    def worst(self, count: int = 10) -> list[LayerEnergy]:
        """The layers of which the least is kept."""
        return sorted(self.layers, key=lambda layer: layer.kept)[:count]


def extract(turbo: Source, base: Source, rank: int, out: str | Path, dtype: str | None = None) -> Extracted:
    """Writes the LoRA of `rank` that is nearest to what `turbo` differs from `base` by, in the layers that its family
    adapts, to the folder `out`, as pipelines of diffusers load it.

    Weights are read from their files, two tensors at a time, and computed in float32. dtype: of the LoRA's weights,
    float16 unless given. RequestError for networks that are not alike, or that do not differ.
    """
    if rank < 1:
        raise RequestError(f"the rank of a LoRA is at least 1, found {rank}")
    out, dtype = Path(out), DTYPES[chosen(dtype, "lora")]
    may_write_new(out)
    kinds = [text_to_image(index_at(source)["_class_name"]) for source in (turbo, base)]
    if kinds[0] != kinds[1]:
        raise RequestError(f"{turbo} is a {kinds[0]} and {base} a {kinds[1]}: a LoRA is made of two pipelines of one "
                           f"class")
    base, turbo = (settled(source, index_at(source)) for source in (base, turbo))
    teacher = load_teacher(base, device="meta")
    if teacher.cls is None:
        raise RequestError(f"{base} is Toy, whose network is none of diffusers: a LoRA is made of two pipelines")
    targets = named_layers(teacher.network, teacher.default_targets)
    with _weights(base, teacher) as old, _weights(turbo, teacher) as new:
        _check_alike(old, new, turbo, base)
        state, layers, beyond = _differences(teacher.network, targets, old, new, rank)
    if not layers:
        raise RequestError(f"no layer of {turbo} that a LoRA adapts differs from {base}: there is nothing to extract")
    with aside(out) as folder:
        save_lora(_lora(state, rank).rounded(dtype), teacher.cls, teacher.family.denoiser, folder)
    return Extracted(out, rank, tuple(layers), beyond)


def _differences(network: nn.Module, targets: Mapping[str, nn.Module], old: _Weights, new: _Weights,
                 rank: int) -> tuple[dict[str, Tensor], list[LayerEnergy], dict[str, tuple[int, float]]]:
    """(the LoRA's weights, what they hold of each layer that differs, what differs beside those)."""
    state: dict[str, Tensor] = {}
    layers: list[LayerEnergy] = []
    beyond: dict[str, tuple[int, float]] = {}
    for name in old.names:
        difference = new[name] - old[name]
        norm, module = difference.double().square().sum().item(), name.rpartition(".")[0]
        if norm == 0:
            continue
        if module in targets and name.endswith(".weight"):
            down, up, kept = factors(difference, rank, name)
            state |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            layers.append(LayerEnergy(module, norm, kept / norm))
        else:
            count, total = beyond.get(kind := _kind(network, name), (0, 0.0))
            beyond[kind] = count + 1, total + norm
    return state, layers, {kind: beyond[kind] for kind in KINDS if kind in beyond}


def factors(difference: Tensor, rank: int, name: str = "") -> tuple[Tensor, Tensor, float]:
    """(A (r, in, ...), B (out, r, ...), the squared norm of B A) of the best approximation of a weight (out, in, ...)
    by a rank of at most `rank`. name: of the weight, which seeds the decomposition."""
    matrix = difference.flatten(1)
    rank = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(0, "extract", name))
        u, s, v = torch.svd_lowrank(matrix, min(rank + OVERSAMPLES, *matrix.shape), POWERS)
    root, ones = s[:rank].sqrt(), (1,) * (difference.ndim - 2)
    down, up = root[:, None] * v[:, :rank].T, u[:, :rank] * root
    kept = s[:rank].double().square().sum().item()
    return down.reshape(rank, *difference.shape[1:]), up.reshape(len(matrix), rank, *ones), kept


def _lora(state: Mapping[str, Tensor], rank: int) -> Lora:
    """Of scale 1. Layers that are narrower than the rank have their own."""
    narrow = {re.escape(name.removesuffix(".lora_A.weight")): len(value) for name, value in state.items()
              if name.endswith(".lora_A.weight") and len(value) < rank}
    return Lora(state, rank, rank, alpha_pattern=narrow, rank_pattern=narrow)


def _kind(network: nn.Module, name: str) -> str:
    """Of what no LoRA of the family's layers reaches, a member of KINDS."""
    place, _, leaf = name.rpartition(".")
    module = network.get_submodule(place)
    if "Norm" in type(module).__name__:
        return "norms"
    if leaf == "bias":
        return "biases"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "other layers" if isinstance(module, nn.Linear | nn.Conv2d) else "other numbers"


# -- weights in their files ------------------------------------------------------------------------------------------

class _Weights:
    """The tensors of a network by name, read from their files when they are asked for: float32."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self.files = files

    @property
    def names(self) -> list[str]:
        return sorted(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name).float()


@contextmanager
def _weights(source: Source, teacher: Teacher) -> Iterator[_Weights]:
    """Of the network of a pipeline, which is of the teacher's kind."""
    denoiser = teacher.family.denoiser
    folder = _folder(source) / denoiser
    if saved_as(folder) is not None:
        raise RequestError(f"the {denoiser} of {source} was saved quantised, and differences of few bits say little: "
                           f"name the plain pipeline")
    files, _ = weight_files(folder, source.variant)
    if not files:
        raise RequestError(f"{folder} holds no .safetensors files of weights: save the pipeline anew by "
                           f"pipe.save_pretrained")
    with ExitStack() as stack:
        held = {file: check_safetensors(file) for file in files}
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        yield _Weights({name: opened[file] for file, names in held.items() for name in names})


def _folder(source: Source) -> Path:
    """Where the files of a pipeline lie; a Hub id is downloaded."""
    if source.is_file:
        raise RequestError(f"{source} is one file of weights under names of its own: name a folder that "
                           f"pipe.save_pretrained wrote, or a Hub id")
    if Path(source.place).is_dir():
        return Path(source.place)
    try:
        return Path(DiffusionPipeline.download(source.place, revision=source.revision, variant=source.variant))
    except (OSError, ValueError, SafetensorError) as error:
        raise RequestError(f"{source} cannot be downloaded: {first_lines(error)}") from error


def _check_alike(old: _Weights, new: _Weights, turbo: Source, base: Source) -> None:
    if odd := sorted({*old.names} ^ {*new.names}):
        has, lacks = (turbo, base) if odd[0] in new.names else (base, turbo)
        raise RequestError(f"{turbo} and {base} are not alike: {len(odd)} tensors are in one of both alone, first "
                           f"{odd[0]}, which {has} has and {lacks} has not")
    if odd := [name for name in old.names if old.shape(name) != new.shape(name)]:
        raise RequestError(f"{turbo} and {base} are not alike: {odd[0]} has the shape {new.shape(odd[0])} in one and "
                           f"{old.shape(odd[0])} in the other")
