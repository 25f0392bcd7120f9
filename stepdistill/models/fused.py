"""LoRAs that a teacher wears: loaded by the pipeline's own loader and added to its weights, before anything else lies
on them."""
from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn

from ..errors import RequestError, first_lines
from .sources import FusedLora

ADAPTER, SHOWN = "fused", 8                        # an adapter's name while it is loaded; numbers of a trace
_NO_KEYS = re.compile(r"No LoRA keys associated to ")


@dataclass(frozen=True)
class Trace:
    """Where a fused LoRA shows: the numbers of one weight of a component that it changed most, without and with all
    LoRAs.

    lora: its number among them; at: places in the flattened weight.
    """

    lora: int
    component: str
    weight: str
    at: tuple[int, ...]
    plain: tuple[float, ...]
    fused: tuple[float, ...]

    def shows(self, pipe: DiffusionPipeline) -> bool:
        """Whether that weight of `pipe` is nearer to the one with the LoRA than to the one without."""
        state = pipe.components[self.component].state_dict()
        stem, _, name = self.weight.rpartition(".")
        # under another adapter
        weight = state[self.weight] if self.weight in state else state[f"{stem}.base_layer.{name}"]
        found = _at(weight, self.at)
        return _apart(found, self.fused) < _apart(found, self.plain)


def fuse_loras(pipe: DiffusionPipeline, loras: Sequence[FusedLora], but: Container[str] = ()) -> tuple[Trace, ...]:
    """Adds LoRAs to the weights of a pipeline, one after the other; it is a plain one then. but: components that have
    them already.

    RequestError for a LoRA that does not fit: of another base, or with nothing for any component.
    """
    components = [name for name in loadable(pipe, loras) if name not in but]
    if not components:
        return ()
    shown: list[tuple[int, str, str, tuple[int, ...], tuple[float, ...]]] = []
    for number, lora in enumerate(loras):
        touched = [name for name in load_lora(pipe, lora) if name in components]
        widest = {name: _widest(pipe.components[name]) for name in touched}
        before = {name: _weight(pipe.components[name], f"{module}.base_layer.weight").clone()
                  for name, module in widest.items()}
        if touched:
            pipe.fuse_lora(components=touched, lora_scale=lora.weight, adapter_names=[ADAPTER])
        pipe.unload_lora_weights()
        for name, module in widest.items():
            moved = (_weight(pipe.components[name], f"{module}.weight") - before[name]).abs().flatten()
            at = tuple(moved.topk(min(SHOWN, len(moved))).indices.tolist())
            shown.append((number, name, f"{module}.weight", at, _at(before[name], at)))
    return tuple(Trace(number, name, weight, at, plain, _at(_weight(pipe.components[name], weight), at))
                 for number, name, weight, at, plain in shown)


def try_loras(pipe: DiffusionPipeline, loras: Sequence[FusedLora]) -> None:
    """RequestError for LoRAs that do not fit networks on the meta device, which have shapes and no weights to add
    to."""
    loadable(pipe, loras)
    for lora in loras:
        load_lora(pipe, lora)
        pipe.unload_lora_weights()


def load_lora(pipe: DiffusionPipeline, lora: FusedLora) -> list[str]:
    """Lays a LoRA on a pipeline, and returns the names of the components that it is for. RequestError where it does not
    fit."""
    refusal = f"the LoRA {lora.path} does not fit this {type(pipe).__name__}"
    try:
        file = lora.file()
        with complaints() as heard:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER, use_safetensors=True)
    except RequestError:
        raise
    # loaders fail in as many ways as there are files
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RequestError(f"{refusal}: {first_lines(error)}") from error
    found = [name for name, adapters in pipe.get_list_adapters().items() if ADAPTER in adapters]
    if not found:
        raise RequestError(f"{refusal}: none of its keys is for one of its layers")
    if heard := [line for line in heard if not _NO_KEYS.match(line)]:
        raise RequestError(f"{refusal}: {' '.join(heard)[:500]}")
    return found


def loadable(pipe: DiffusionPipeline, loras: Sequence[FusedLora]) -> list[str]:
    """The components that a LoRA can be for."""
    if not isinstance(pipe, LoraBaseMixin):
        raise RequestError(f"the LoRA {loras[0].path} cannot be used: a {type(pipe).__name__} loads none")
    return list(pipe._lora_loadable_modules)


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Collects, instead of printing them, the warnings of diffusers and peft: about missing and unexpected keys they
    raise nothing. Those of diffusers also where it is kept silent, as the commands keep it."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())      # type: ignore[method-assign]
    logger = logging.getLogger("diffusers")
    before, level = logger.handlers, logger.level
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield messages
    finally:
        logger.handlers = before
        logger.setLevel(level)
        messages += [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]


def _widest(network: nn.Module) -> str:
    """The module on which the loaded LoRA changes most, by the norms of its two factors."""
    state = network.state_dict()
    up = f".lora_B.{ADAPTER}.weight"
    modules = [key.removesuffix(up) for key in state if key.endswith(up)]
    size = lambda module: (state[module + up].norm() * state[f"{module}.lora_A.{ADAPTER}.weight"].norm()).item()
    return max(modules, key=size)


def _weight(network: nn.Module, name: str) -> Tensor:
    return network.get_parameter(name).detach()


def _at(weight: Tensor, at: Sequence[int]) -> tuple[float, ...]:
    return tuple(weight.detach().flatten()[torch.tensor(at, device=weight.device)].double().tolist())


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def traces_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Trace, ...]:
    """Traces as `vars` of them went through JSON."""
    return tuple(Trace(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})
                 for row in rows)
