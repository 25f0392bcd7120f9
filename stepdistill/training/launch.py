"""How this process was started: `accelerate launch` and `torchrun` set the environment, a plain start leaves it
empty. And where its figures and pictures go: accelerate's trackers."""
from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from ..errors import RequestError

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed keeps one optimizer for the whole model, and roles are trained by one each",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP wraps one model, and roles share one base. `train.fsdp: true` in "
    "the recipe shards that base",
}


def launched() -> torch.device:
    """Joins the process group, if there is one, and gives the device that this process trains on."""
    for variable, reason in REFUSED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise RequestError(f"{variable} is set: {reason}. Launch with plain data parallelism: "
                               f"`accelerate launch --multi_gpu` or `torchrun`.")
    return PartialState().device


WANDB_ID = "wandb.id"                     # in a run's folder: resumed, it is the same run there


def trackers(names: Sequence[str], run_dir: Path, done: int, config: Mapping[str, Any]) -> list[GeneralTracker]:
    """Those that are asked for, started. done: steps that a resumed run has; config: what a tracker shows beside the
    figures."""
    return [_MAKERS[name](run_dir, done, config) for name in names]


def _tensorboard(run_dir: Path, done: int, config: Mapping[str, Any]) -> GeneralTracker:
    tracker = TensorBoardTracker("tensorboard", run_dir, purge_step=done + 1)
    tracker.start()
    return tracker


def _wandb(run_dir: Path, done: int, config: Mapping[str, Any]) -> GeneralTracker:
    """WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE=offline hold as ever; the project is stepdistill unless they say
    otherwise."""
    known = run_dir / WANDB_ID
    if not known.is_file():
        known.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    tracker = WandBTracker(os.environ.get("WANDB_PROJECT", "stepdistill"), name=run_dir.resolve().name,
                           id=known.read_text(encoding="utf-8").strip(),
                           resume="allow", dir=str(run_dir), config=dict(config))
    tracker.start()
    return tracker


_MAKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
