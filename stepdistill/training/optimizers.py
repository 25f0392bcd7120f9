"""One optimizer a role: AdamW with clipping, and a learning rate that is a function of the step.

Its moments are float32, or 8 bits by bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861).
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, inf, pi
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp import GradScaler

from .. import parallel

MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")       # of AdamW, and as bitsandbytes names them
FUSED = ("cpu", "cuda", "mps", "xpu")      # devices for which AdamW has one kernel for all tensors


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; what is trained stands in the method."""

    updates: int                            # training steps: each runs every update that is due
    lr: float = 1e-4
    rates: Mapping[str, float] = field(default_factory=dict)    # role -> its own lr, with the same warm-up and decay
    warmup: int = 0                         # steps over which the learning rate rises linearly
    decay: Literal["constant", "cosine"] = "constant"    # after the warm-up; cosine falls to 0 at the last step
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    clip: float | None = 1.0                # largest norm of a role's gradient; None: any
    accumulate: int = 1                     # micro-batches an update
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"    # 16 bits: autocast; weights and optimizer stay float32
    compile: bool = False                   # networks are compiled: every state is warmed up before the first step
    seed: int = 0
    checkpoint_every: int | None = None     # steps; the last step is always saved
    keep: int | None = None                 # checkpoints that are kept, the newest ones; None: all
    log_every: int = 10                     # steps between transfers of losses from the device
    trackers: Sequence[str] = ("tensorboard",)      # that losses and pictures are shown to

    def __post_init__(self) -> None:
        for name in ("updates", "accumulate", "log_every", "checkpoint_every", "keep"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1; found {value}")
        if (min((self.lr, *self.rates.values())) <= 0 or self.clip is not None and self.clip <= 0 or self.warmup < 0
            or self.weight_decay < 0):
            raise ValueError("train.lr and train.clip must be above 0, train.warmup and train.weight_decay not below; "
                             "found "
                             f"{(self.lr, *self.rates.values())}, {self.clip}, {self.warmup}, {self.weight_decay}")


def learning_rate(config: TrainConfig, index: int, role: str | None = None) -> float:
    """Of the training step with this index, from 0, and of a role that may have a rate of its own."""
    lr = config.lr if role is None else config.rates.get(role, config.lr)
    if index < config.warmup:
        return lr * (index + 1) / config.warmup
    if config.decay == "constant":
        return lr
    return lr * 0.5 * (1 + cos(pi * (index - config.warmup) / max(1, config.updates - config.warmup)))


class RoleOptimizer:
    """AdamW on the parameters of one role."""

    def __init__(self, parameters: list[torch.nn.Parameter], config: TrainConfig) -> None:
        if not parameters:
            raise ValueError("a role without parameters cannot be trained")
        self.parameters, self.clip = parameters, inf if config.clip is None else config.clip
        self.whole = config.optimizer == "adamw"          # moments in float32, three tensors a parameter
        common = {"lr": config.lr, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
        if config.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit  # an extra, looked for when the recipe was checked
            self.adamw = AdamW8bit(parameters, **common)
        else:
            self.adamw = torch.optim.AdamW(parameters, fused=parameters[0].device.type in FUSED, **common)

    def step(self, lr: float, scaler: GradScaler) -> Tensor:
        """Averages the gradients over ranks, unscales and clips them, steps and drops them. Returns their norm before
        clipping, (). Where a scaled gradient overflowed the norm is not finite, and the scaler leaves the step out."""
        parallel.all_reduce_mean_([p.grad for p in self.parameters if p.grad is not None])
        scaler.unscale_(self.adamw)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.adamw.param_groups[0]["lr"] = lr
        scaler.step(self.adamw)
        self.drop()
        return norm

    def drop(self) -> None:
        """The gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Flat: "exp_avg.3" is the moment of the fourth parameter. A parameter that never had a gradient has none."""
        states = self.adamw.state_dict()["state"]
        return {f"{name}.{i}": torch.as_tensor(value) for i, state in states.items() for name, value in _flat(state)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave. ValueError for what is not of these parameters."""
        self._check(tensors)
        states: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            name, i = key.rsplit(".", 1)
            *outer, last = name.split(".")
            state = states.setdefault(int(i), {})
            for part in outer:
                state = state.setdefault(part, {})
            state[last] = tensor.item() if tensor.dtype == torch.int64 and not tensor.dim() else tensor
        self.adamw.load_state_dict({"state": states, "param_groups": self.adamw.state_dict()["param_groups"]})

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            name, _, i = key.rpartition(".")
            if not name or not i.isdecimal() or int(i) >= len(self.parameters):
                raise ValueError(f"its optimizer's {key} belongs to none of {len(self.parameters)} parameters")
            shape = self.parameters[int(i)].shape
            if name in MOMENTS and tensor.shape != shape:
                raise ValueError(f"its optimizer's {key} is of shape {tuple(tensor.shape)}, and its parameter of "
                                 f"{tuple(shape)}")
            if self.whole and name not in (*MOMENTS[:2], "step"):
                raise ValueError(f"its optimizer's {key} is nothing that AdamW keeps")
        for i in {key.rpartition(".")[2] for key in tensors}:
            held = {key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] == i}
            if self.whole and len(held) < 3:
                raise ValueError(f"its optimizer holds only {', '.join(sorted(held))} of parameter {i}")


def _flat(state: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value): bitsandbytes keeps its tensors in a table of the state, and a step that is Python's
    number."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def scales(scalers: Mapping[str, GradScaler]) -> dict[str, Tensor]:
    """Flat: the loss scale of each update, and how many steps it has held."""
    states = {name: scaler.state_dict() for name, scaler in scalers.items()}
    return {f"{name}.{key}": torch.tensor(state[key], dtype=torch.float64) for name, state in states.items()
            for key in ("scale", "_growth_tracker")}


def load_scales(scalers: Mapping[str, GradScaler], saved: Mapping[str, Tensor]) -> None:
    for name, scaler in scalers.items():
        scaler.load_state_dict(scaler.state_dict() | {"scale": saved[f"{name}.scale"].item(),
                                                      "_growth_tracker": int(saved[f"{name}._growth_tracker"])})
