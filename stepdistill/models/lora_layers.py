"""What a linear layer and a convolution with LoRA adapters compute: W x + s B A x, s = alpha / rank (arXiv:2106.09685).

The layers are peft's, with peft's names and parameters, and give peft's values. Only what lies around the two products
is left out: a sum of its own, a product with the scale, casts there and back, the look at settings that no adapter of
ours has. So these functions serve plain LoRA without dropout, of which at most one is active, on a base that is not
merged.

Where no gradient is wanted and all is float32, W + s B A is formed anew for each call if that is less work than two
more passes over the input. On a 16-bit base it never is: what one update of an adapter adds is below the rounding of W.
"""
from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(Protocol):
    """A LoRA layer as peft makes it. `active_adapters` holds at most one name; scaling: name -> alpha / rank."""

    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    scaling: dict[str, float]
    _active_adapter: list[str]


def linear(layer: Layer, x: Tensor) -> Tensor:
    """x (..., I) -> (..., O), in the dtype of the base's output."""
    base, active = layer.base_layer, layer._active_adapter
    if not active or active[0] not in layer.scaling:
        return base(x)
    name = active[0]
    a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    rows = x.reshape(-1, x.shape[-1])
    if _merges(len(rows), x, base.weight, a):
        return F.linear(x, torch.addmm(base.weight, b, a, alpha=scale), base.bias)
    out, low = base(rows), F.linear(_read(rows, a), a)
    if out.dtype == low.dtype:
        out.addmm_(low, b.t().to(low.dtype), alpha=scale)          # autocast casts no operand of an in-place product
    else:
        out.add_(F.linear(low, b * scale))                     # float32 to 16 bits: rounded once, as is its gradient
    return out.view(*x.shape[:-1], -1)


def convolution(layer: Layer, x: Tensor) -> Tensor:
    """x (B, I, H, W) -> (B, O, H', W'), in the dtype of the base's output."""
    base, active = layer.base_layer, layer._active_adapter
    if not active or active[0] not in layer.scaling:
        return base(x)
    name = active[0]
    down, up, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    places = x.shape[0] * x.shape[2] * x.shape[3] // (base.stride[0] * base.stride[1])
    if _alike(base, down) and _merges(places, x, base.weight, down.weight):
        change = (up.weight.flatten(1) @ down.weight.flatten(1)).view_as(base.weight)
        return F.conv2d(x, base.weight.add(change, alpha=scale), base.bias, base.stride, base.padding)
    out, low = base(x), down(_read(x, down.weight))
    return out.add_(up(low), alpha=scale) if out.dtype == low.dtype else out.add_(up(low * scale))


def _read(x: Tensor, weight: Tensor) -> Tensor:
    """The input as an adapter reads it: in its own precision, but for autocast, which casts what it wants cast."""
    return x if x.dtype == weight.dtype or _cast(x) else x.to(weight.dtype)


def _cast(x: Tensor) -> bool:
    """Whether autocast casts what is computed of it. Tensors without values are never cast."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _alike(base: nn.Module, down: nn.Module) -> bool:
    """Whether an adapter's two convolutions are one with a weight of the base's shape: peft's first has no groups."""
    return base.groups == 1 and base.dilation == down.dilation and base.padding_mode == down.padding_mode


def _merges(places: int, x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Whether to form W + s B A: r I O products, where two passes over `places` vectors take r (I + O) for each."""
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad):
        return False
    if not x.dtype == weight.dtype == a.dtype == torch.float32 or _cast(x):
        return False
    return places * (len(weight) + weight.numel() // len(weight)) >= weight.numel()
