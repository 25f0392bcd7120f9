"""How this process was started: `accelerate launch` and `torchrun` set the environment, a plain start leaves it
empty."""
from __future__ import annotations

import os

import torch
from accelerate import PartialState

from ..errors import RequestError

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed keeps one optimizer for the whole model, and roles are trained by one each",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP wraps one model, and roles share one base. `train.fsdp: true` in the recipe shards that base",
}


def launched() -> torch.device:
    """Joins the process group, if there is one, and gives the device that this process trains on."""
    for variable, reason in REFUSED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise RequestError(f"{variable} is set: {reason}. Launch with plain data parallelism: "
                               f"`accelerate launch --multi_gpu` or `torchrun`.")
    return PartialState().device
