"""Where a number that is not finite came from, once it stands in the log, and what helps."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..diffusion.contracts import Batch
from . import checkpoints
from .optimizers import TrainConfig

if TYPE_CHECKING:
    from .loop import Trainer

SHOWN = 4                                          # numbers of samples in a message


def first(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that is not finite. The device is waited for once."""
    names = [name for name, tensor in state.items() if tensor.is_floating_point()]
    whole = torch.stack([state[name].isfinite().all() for name in names]).tolist() if names else []
    return next((name for name, finite in zip(names, whole, strict=True) if not finite), None)


def advice(config: TrainConfig) -> str:
    """What can be changed on the way. A step sees the same data and the same noise again."""
    rates = {"train.lr": config.lr} | {f"{role}.lr": rate for role, rate in config.rates.items()}
    lower = " ".join(f"--set {name}={rate / 2:g}" for name, rate in rates.items())
    half = "" if config.precision == "fp32" else "; --set train.precision=fp32"
    clip = 0.5 if config.clip is None else config.clip / 2
    return (f"Unchanged it ends in the same step again. What can be changed with --resume: {lower}; --set "
            f"train.clip={clip:g}{half}.")


def explained(trainer: Trainer, step: int) -> str:
    """A sentence: in which samples, or in which module, the first such number of a step arises. The step is run again
    from the newest checkpoint, since the weights are of no use after it."""
    saved = checkpoints.newest(trainer.run_dir, trainer.take)
    for update, repeat, shared in trainer.due(step - 1):
        if samples := [i for batch in trainer.micro_batches(step - 1, shared) for i in _samples(batch)]:
            return f"The data of samples {', '.join(map(str, samples[:SHOWN]))} are not finite."
        if saved is None:
            continue
        logs: dict[str, Tensor] = {}
        with watching() as found:
            trainer.gradients(update, step - 1, repeat, shared, logs)
        if found:
            return f"It arises in {found[0]}, with the weights of {saved[0].name}."
        if (name := first(logs)) is not None:
            return (f"It arises in the loss {name} itself: every module's output is finite, with the weights of "
                    f"{saved[0].name}.")
        for role in update.trains:
            gradients = {str(i): p.grad for i, p in enumerate(trainer.optimizers[role].parameters)
                         if p.grad is not None}
            trainer.optimizers[role].drop()
            if first(gradients) is not None:
                return (f"It arises in the gradients of the {role}: the loss is finite, with the weights of "
                        f"{saved[0].name}.")
    return ("" if saved is None else f"With the weights of {saved[0].name} the step is finite: the steps between "
            "drove them away.")


@contextmanager
def watching() -> Iterator[list[str]]:
    """Yields a list that holds, once there is one, the module whose output is the first that is not finite of inputs
    that are."""
    inside: list[nn.Module] = []
    found: list[str] = []

    def leave(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        path = _path(inside)
        inside.pop()
        if not found and not _finite(output) and _finite((args, options)):
            weights = "" if _finite(dict(module.named_parameters())) else ", whose weights are not finite"
            found.append(f"{path} ({type(module).__name__}){weights}")

    handles = [register_module_forward_pre_hook(lambda module, args: inside.append(module)),
               register_module_forward_hook(leave, with_kwargs=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _path(inside: list[nn.Module]) -> str:
    """The innermost module as it is found from the outermost one: a list of modules is none that is called."""
    names = [next((name for name, one in outer.named_modules() if one is inner), type(inner).__name__)
             for outer, inner in pairwise(inside)]
    return ".".join([type(inside[0]).__name__, *names])


def _samples(batch: Batch) -> list[int]:
    """Those whose data are not finite."""
    tensors = [batch.x0, *batch.cond.tensors(),
               *(() if batch.pairs is None else (batch.pairs.noise, batch.pairs.nodes))]
    rows = [tensor.flatten(1).isfinite().all(1) if tensor.dim() > 1 else tensor.isfinite() for tensor in tensors
            if tensor is not None and tensor.is_floating_point()]
    return [int(i) for i, whole in zip(batch.ids, torch.stack([row.cpu() for row in rows]).all(0), strict=True)
            if not whole] if rows else []


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, (tuple, list)) else True
