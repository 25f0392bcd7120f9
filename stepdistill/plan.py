"""What a run will cost, read off configs: networks stand on the meta device, where they have shapes and no bytes."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from . import resources
from .diffusion.contracts import Batch, Condition
from .diffusion.draws import Step
from .diffusion.prediction import Prediction
from .diffusion.schedule import Schedule
from .errors import RequestError
from .methods import load_method
from .methods.base import Follows, Frozen, Need, Trained
from .models.families import FAMILIES, Layout, call_of, layout
from .recipe import Recipe, RoleChoice

ADAM, GRADIENT, FLOAT = 8, 4, 4       # bytes a trained parameter: two moments, its gradient, itself
LIBRARIES = 600_000_000               # bytes that torch, diffusers and transformers hold before any network
Empty = Callable[..., Tensor]


def plan(recipe: Recipe) -> dict[str, Any]:
    """{roles: {name: {parameters, trained, bytes}}, bytes, peak, passes, disk, downloads}; bytes as plain numbers.

    bytes: of all weights; peak: with gradients, optimizers and activations, an estimate. No weights are read.
    """
    source = resources.pipeline(recipe.teacher)
    settings = recipe.method_settings()
    needs = load_method(recipe.method).needs(settings, recipe.student.lora is None)
    if recipe.train.ema is not None:
        needs = needs | {"ema": Follows("student", recipe.train.ema)}
    parts, known = _parts(source, recipe.revision)
    roles = _roles(recipe, needs, parts, known)
    weights = sum(row["bytes"] for row in roles.values())
    trained = sum(row["trained"] for row in roles.values())
    passes = _passes(recipe, settings, needs, parts[known.denoiser], known.schedule)
    inputs = partial(known.inputs, parts, call_of(source))
    activations = _activations(recipe, parts[known.denoiser], inputs)
    return {"roles": roles, "bytes": weights, "peak": LIBRARIES + weights + trained * (GRADIENT + ADAM) + activations,
            "passes": passes, "disk": _disk(recipe, roles, parts, inputs),
            "downloads": _downloads(source, recipe.revision, roles, known.denoiser)}


# -- networks without weights ----------------------------------------------------------------------------------------------

def _parts(source: str, revision: str | None) -> tuple[dict[str, nn.Module], Layout]:
    """The pipeline's networks by name, and what its family knows of it."""
    try:
        index = diffusers.DiffusionPipeline.load_config(source, revision=revision)
    except (OSError, ValueError) as error:
        raise RequestError(f"{source} is no diffusers pipeline: {str(error).strip().splitlines()[0]}") from error
    if index["_class_name"] not in FAMILIES:
        raise RequestError(f"{source} is a {index['_class_name']}; supported are {', '.join(FAMILIES)}")
    parts, known = {}, layout(index["_class_name"])
    for name in (known.denoiser, "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if index.get(name, [None])[0] is not None:
            parts[name] = _network(source, revision, name, *index[name])
    return parts, known


def _network(source: str, revision: str | None, name: str, library: str, kind: str) -> nn.Module:
    with torch.device("meta"):
        if library == "diffusers":
            cls = getattr(diffusers, kind)
            return cls.from_config(cls.load_config(source, subfolder=name, revision=revision))
        cls = getattr(transformers, kind)
        return cls(cls.config_class.from_pretrained(source, subfolder=name, revision=revision))


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# -- roles -----------------------------------------------------------------------------------------------------------------

def _roles(recipe: Recipe, needs: Mapping[str, Need], parts: Mapping[str, nn.Module], known: Layout) -> dict[str, dict[str, int]]:
    denoiser = parts[known.denoiser]
    base = 2 if recipe.train.precision == "bf16" and recipe.student.lora is not None else FLOAT
    rows = {"teacher": _row(_size(denoiser), 0, base)}
    rows |= {name: _row(_size(part), 0, base) for name, part in parts.items() if part is not denoiser}
    for name, need in needs.items():
        if not isinstance(need, Frozen):
            count = _count(denoiser, _choice(recipe, needs, name), known.targets)
            rows[name] = _row(count, count if isinstance(need, Trained) else 0, FLOAT)
    return rows


def _row(parameters: int, trained: int, width: int) -> dict[str, int]:
    return {"parameters": parameters, "trained": trained, "bytes": parameters * width}


def _choice(recipe: Recipe, needs: Mapping[str, Need], name: str) -> RoleChoice:
    need = needs[name]
    if isinstance(need, Follows):
        return _choice(recipe, needs, need.leader)
    return recipe.critic if name == "critic" and recipe.critic is not None else recipe.student


def _count(network: nn.Module, choice: RoleChoice, usual: Sequence[str]) -> int:
    """Parameters of an adapter, or of a copy."""
    if choice.lora is None:
        return _size(network)
    targets = choice.lora.targets or usual
    layers = [module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
              and any(name == target or name.endswith(f".{target}") for target in targets)]
    return choice.lora.rank * sum(_rows_and_columns(layer) for layer in layers)


def _rows_and_columns(layer: nn.Module) -> int:
    """What one rank of an adapter adds: its row over the input (a convolution's with its window) and its column."""
    out, *rest = layer.weight.shape
    return out + math.prod(rest)


# -- passes ----------------------------------------------------------------------------------------------------------------

@dataclass
class _Counter:
    """A role that predicts zeros and counts who asks."""

    schedule: Schedule
    forward: list[int] = field(default_factory=lambda: [0])
    backward: list[int] = field(default_factory=lambda: [0])

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        self.forward[0] += len(x_t)
        self.backward[0] += len(x_t) if torch.is_grad_enabled() else 0
        return Prediction(torch.zeros_like(x_t, requires_grad=torch.is_grad_enabled()), x_t, t, self.schedule, "velocity")


def _passes(recipe: Recipe, settings: Any, needs: Mapping[str, Need], denoiser: nn.Module, schedule: Schedule) -> dict[str, int]:
    """Network evaluations a sample and step, by running the method's own losses on roles that count."""
    counter = _Counter(schedule)
    method = load_method(recipe.method)(settings, dict.fromkeys(needs, counter), recipe.guidance, recipe.steps)
    shape, ids = (denoiser.config.in_channels, 2, 2), torch.arange(2)
    null = Condition(text=torch.zeros(2, 1, 1))
    batch = Batch(ids, Condition(text=torch.zeros(2, 1, 1), null=null), torch.zeros(2, *shape))
    for update in method.updates():
        for repeat in range(update.repeat):
            update.loss(batch, Step(0, 0, 0.0, update.name, repeat, ids))
    return {"forward": counter.forward[0] // 2, "backward": counter.backward[0] // 2, "batch": recipe.data.batch,
            "updates": recipe.train.updates}


def _activations(recipe: Recipe, network: nn.Module, inputs: Callable[[Empty], dict[str, Any]]) -> int:
    """Bytes that autograd keeps of one micro-batch, counted in a pass on the meta device."""
    batch = recipe.data.batch // recipe.train.accumulate
    width = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    if recipe.train.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    network.train()
    if width != torch.float32:
        network.to(width)
    own = {id(parameter) for parameter in network.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            seen[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    kept: list[Tensor] = []                # alive to the end, so that no two storages share an id
    told = inputs(lambda *shape: torch.empty(batch, *shape, device="meta", dtype=width))
    next(_tensors(told)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(**told, return_dict=False)
    return sum(seen.values())


def _tensors(told: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in told.values():
        if isinstance(value, Tensor):
            yield value
        elif value is not None:
            yield from _tensors(value)


# -- disk and net ----------------------------------------------------------------------------------------------------------

def _disk(recipe: Recipe, roles: Mapping[str, Mapping[str, int]], parts: Mapping[str, nn.Module],
          inputs: Callable[[Empty], dict[str, Any]]) -> int:
    """Bytes of checkpoints (every role and both moments), the export, and the cache."""
    adapters = [row for name, row in roles.items() if name not in (*parts, "teacher")]
    each = sum(row["bytes"] + row["trained"] * ADAM for row in adapters)
    count = -(-recipe.train.updates // (recipe.train.checkpoint_every or recipe.train.updates))
    told = _tensors(inputs(lambda *shape: torch.empty(shape, device="meta")))
    sample = FLOAT * sum(tensor.numel() for tensor in told if tensor.ndim)            # all but the time
    cached = recipe.data.count if recipe.data.count and (recipe.data.cache or recipe.data.kind == "samples") else 0
    return count * each + roles["student"]["bytes"] + cached * sample


def _downloads(source: str, revision: str | None, roles: Mapping[str, Mapping[str, int]], denoiser: str) -> list[str]:
    """A Hub teacher whose weights are not in the cache yet."""
    if resources.locate(source) is not None:
        return []
    from huggingface_hub import try_to_load_from_cache
    whole = f"{denoiser}/diffusion_pytorch_model.safetensors"
    if any(isinstance(try_to_load_from_cache(source, file, revision=revision), str) for file in (whole, f"{whole}.index.json")):
        return []
    size = sum(row["parameters"] for name, row in roles.items() if row["trained"] == 0) * FLOAT
    return [f"{source} (up to {size / 1e9:.1f} GB)"]
