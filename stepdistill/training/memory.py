"""What training holds on a device, by role."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .optimizers import RoleOptimizer

GB = 1e9


def held(optimizers: Mapping[str, RoleOptimizer], device: torch.device) -> str:
    """A clause: the bytes of each trained role (weights, gradients and both moments), and of all the rest at its
    peak."""
    own = {role: _bytes(optimizer) for role, optimizer in optimizers.items()}
    found = ", ".join(f"{role} {size / GB:.2f} GB" for role, size in own.items())
    text = f"held were, with gradients and moments, {found}"
    if device.type != "cuda":
        return text
    peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    rest = peak - sum(own.values())
    return (f"{text}, and {rest / GB:.2f} GB of frozen networks, averages and activations, {peak / GB:.2f} GB at the "
            "peak on a "
            f"{torch.cuda.get_device_name(device)} of {total / GB:.1f} GB")


def _bytes(optimizer: RoleOptimizer) -> int:
    moments = [value for state in optimizer.adamw.state.values() for value in state.values()
               if isinstance(value, Tensor)]
    gradients = [p.grad for p in optimizer.parameters if p.grad is not None]
    return sum(t.numel() * t.element_size() for t in (*optimizer.parameters, *gradients, *moments))
