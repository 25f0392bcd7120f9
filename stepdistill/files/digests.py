"""What tensors hold, in one short text: what changes on a disk after it was written is found when it is read."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DIGEST = "digest"                 # the entry of a file's metadata


def digest(tensors: Mapping[str, Tensor], beside: Any) -> str:
    """sha256 over names, dtypes, shapes and numbers of tensors on the CPU, and over what is kept beside them, in
    JSON."""
    made = hashlib.sha256(json.dumps(beside, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        made.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return made.hexdigest()
