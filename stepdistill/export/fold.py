"""A student that is told its guidance scale, at one fixed scale, as a stock LoRA."""
from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RequestError
from .student import Lora

MODULE = "time_embedding.linear_1"


def folded(lora: Lora, cond_proj: Tensor, embedding: Tensor, unet: torch.nn.Module, told_times: Tensor) -> Lora:
    """The adapter of the same student for a stock UNet without `time_cond_proj`. embedding: (D,) of the scale.

    The network computes linear_1(s + c) with s the sinusoids of the told time and c = cond_proj(embedding):
    linear_1(s) plus the constant b = W c. A stock adapter can hold a constant as `lora_bias`, but peft gives every
    module of the adapter one, and cannot fuse those whose base has none, the attention projections. The slowest
    sinusoids span a constant, so one rank does: b u^T with u . s(t) = 1 at every told time.
    """
    W = unet.get_submodule(MODULE).weight.double()
    key = f"{MODULE}.lora_A.weight"
    if key in lora.state:
        W = W + lora.scaling(MODULE) * lora.state[f"{MODULE}.lora_B.weight"].double() @ lora.state[key].double()
    b = W @ (cond_proj.double() @ embedding.double())
    return lora.extended(MODULE, constant(unet.time_proj(told_times).double()).float(), b.float())


def constant(s: Tensor, tolerance: float = 1e-5) -> Tensor:
    """The u that minimises |s u - 1|^2 for s (N, in) float64. RequestError if no u comes within the tolerance.

    The ridge of 1e-12 keeps u small (about 1 / in), so that float32 products stay as exact as the network's own.
    """
    gram = s.T @ s / len(s) + 1e-12 * torch.eye(s.shape[1], dtype=s.dtype)
    u = torch.linalg.solve(gram, s.mean(0))
    error = (s @ u - 1).abs().max().item()
    if not error <= tolerance:
        raise RequestError(f"the time embedding of this network cannot carry a constant: {error:.1e} off where "
                           f"{tolerance:.0e} is needed, so its guidance cannot be folded into a LoRA; "
                           "export with --to pipeline")
    return u
