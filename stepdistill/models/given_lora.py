"""A LoRA that somebody has, as a role can begin with it. The stock pipeline's own loader reads it, which knows all
formats."""
from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..diffusion.draws import key
from ..errors import RequestError
from .adapters import LoraPair, named_layers, pairs_of
from .fused import ADAPTER, load_lora, loadable
from .loading import slots
from .roles import Lora, Weights
from .sources import FusedLora
from .teacher import Teacher


def given_lora(teacher: Teacher, path: str) -> Weights:
    """A LoRA of the teacher's network as the adapter of a role, which computes the same. path: a folder, a .safetensors
    file, or a Hub id.

    Its rank is the largest of the layers', the others are filled up with rows that contribute nothing yet; its targets
    are the full names of its layers. Where their scales differ, they are multiplied in, and alpha is the rank. On a
    base of 16 bits the stock loader rounds its weights to these; on the meta device the shapes are right.

    RequestError for what the stock loader refuses, for a LoRA of another component too, and for what is no plain LoRA.
    """
    layers = _read(teacher, path)
    rank, scales = max(len(layer.a) for layer in layers.values()), {layer.scale for layer in layers.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    targets = tuple(sorted(layers))
    state: dict[str, Tensor] = {}
    for name, module in named_layers(teacher.network, targets).items():
        layer = layers[name] if name in layers else _silent(module)
        down, up = _padded(layer, rank, name)
        state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * (layer.scale / scale)}
    return Weights(Lora(rank, rank * scale, targets), state)


def wearing(network: nn.Module, weights: Weights) -> Callable[[float], None]:
    """A function that gives the network an adapter at a weight, from its own weights anew each time; at 0 it is the
    base again.

    weights: of `given_lora`. A sum costs a pass nothing, where an adapter beside the weights does.
    """
    lora, layers = weights.setting, {}
    for name, module in named_layers(network, lora.targets).items():
        down, up = weights.state[f"{name}.lora_A.weight"], weights.state[f"{name}.lora_B.weight"]
        added = (lora.alpha / lora.rank) * (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])
        layers[name] = module.weight, module.weight.detach().clone(), added.to(module.weight)

    @torch.no_grad()
    def wear(weight: float) -> None:
        for parameter, own, added in layers.values():
            parameter.copy_(own + weight * added)

    return wear


def _read(teacher: Teacher, path: str) -> dict[str, LoraPair]:
    """Its layers by their names in the network, which stays as it was."""
    pipe, denoiser = _pipeline(teacher), teacher.family.denoiser
    loadable(pipe, [FusedLora(path)])
    found = load_lora(pipe, FusedLora(path))
    try:
        if others := [name for name in found if name != denoiser]:
            raise RequestError(f"the LoRA {path} is for the {others[0]} too, and a student is a {denoiser} alone: "
                               f"name a LoRA of that alone")
        return pairs_of(teacher.network, ADAPTER)
    except ValueError as error:
        raise RequestError(f"the LoRA {path} is no plain one: {error}; a student begins with pairs of A and B") \
            from error
    finally:
        pipe.unload_lora_weights()


def _pipeline(teacher: Teacher) -> DiffusionPipeline:
    """A pipeline around the teacher's network, which its loader can lay a LoRA on."""
    if teacher.loaded is not None:
        return teacher.loaded
    parts = {name: teacher.parts.get(name) for name in slots(teacher.cls)}
    return teacher.cls(**parts, **{name: value for name, value in teacher.family.arguments(teacher.cls.__name__).items()
                                   if name not in parts})


def _silent(module: nn.Module) -> LoraPair:
    """Of a layer that the targets name too."""
    linear = isinstance(module, nn.Linear)                     # a quantised weight has another shape
    rows, columns, *kernel = (module.out_features, module.in_features) if linear else module.weight.shape
    return LoraPair(torch.zeros(0, columns, *kernel), torch.zeros(rows, 0, *(1 for _ in kernel)), 1.0)


def _padded(layer: LoraPair, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """(A, B) of this rank: new rows of A as a new adapter has them, and zeros for them in B."""
    lacking = rank - len(layer.a)
    generator = torch.Generator().manual_seed(key(0, "given", name))
    rows = torch.randn(lacking, *layer.a.shape[1:], generator=generator) / rank
    columns = layer.b.new_zeros(len(layer.b), lacking, *layer.b.shape[2:])
    return torch.cat([layer.a, rows.to(layer.a)]), torch.cat([layer.b, columns], 1)
