"""How often networks are evaluated, as their calls show."""
from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Iterator

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..errors import RequestError


def denoiser_of(pipeline: DiffusionPipeline) -> torch.nn.Module:
    for name in ("unet", "transformer"):
        if name in pipeline.components:
            return pipeline.components[name]
    raise RequestError(f"{type(pipeline).__name__} has neither a unet nor a transformer whose evaluations could "
                       "be counted")


@contextmanager
def counted(*networks: torch.nn.Module) -> Iterator[list[int]]:
    """Yields [samples that passed the networks so far]."""
    count = [0]
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(_counting(network, count))
        yield count


@contextmanager
def _counting(network: torch.nn.Module, count: list[int]) -> Iterator[None]:
    own, forward = network.__dict__.get("forward"), network.forward

    def counting(*args, **kwargs):
        count[0] += len(next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
        return forward(*args, **kwargs)

    network.forward = counting
    try:
        yield
    finally:
        del network.forward
        if own is not None:
            network.forward = own
