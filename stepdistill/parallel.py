"""Ranks and what they exchange: the only use of torch.distributed. With one process every function is the identity."""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .errors import RequestError

Value = TypeVar("Value")
_GONE = re.compile(r"Connection (closed|reset|refused)|Broken pipe|[Tt]imed out waiting|Socket "
                   r"(Timeout|closed)|connectFullMesh")


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if _many() else 0


def world_size() -> int:
    return dist.get_world_size() if _many() else 1


def all_reduce_mean_(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over the ranks, in one message a dtype. Every rank passes the same shapes."""
    if not _many():
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        joined = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(joined)
        joined /= world_size()
        parts = joined.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view_as(tensor) for part, tensor in zip(parts, group, strict=True)])


def gather(tensor: Tensor) -> Tensor:
    """Joins the ranks' tensors, of equal shape, along the first axis, in rank order."""
    if not _many():
        return tensor
    # which carries what lies on GPUs alone
    carried = (tensor.cuda() if dist.get_backend() == "nccl" else tensor).contiguous()
    parts = [torch.empty_like(carried) for _ in range(world_size())]
    dist.all_gather(parts, carried)
    return torch.cat(parts).to(tensor.device)


def gather_objects(value: Value) -> list[Value]:
    """What each rank passes, in rank order: anything small that can be sent."""
    if not _many():
        return [value]
    found: list[Value] = [value] * world_size()
    dist.all_gather_object(found, value)
    return found


def share(values: Sequence[Value]) -> Sequence[Value]:
    """This rank's part of what all of them do together. `dealt` joins what came of the parts."""
    return values[rank()::world_size()]


def dealt(own: Sequence[Value]) -> list[Value]:
    """What came of every rank's `share`, one of each, in the order of the whole."""
    parts = gather_objects(own)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


@contextmanager
def held_by_first(held: AbstractContextManager[None]) -> Iterator[None]:
    """Rank 0 enters it for all. Where it is refused there, the RequestError is raised on every rank."""
    refused: RequestError | None = None
    with ExitStack() as stack:
        if rank() == 0:
            try:
                stack.enter_context(held)
            except RequestError as error:
                refused = error
        if refusal := gather_objects(refused)[0]:
            raise refusal
        yield


def shard_(network: nn.Module, blocks: Sequence[nn.Module], whole: Iterable[nn.Parameter]) -> None:
    """Shards a network's weights over the ranks by FSDP2: a block's are gathered while it runs, the rest with the
    network. whole: the parameters that stay whole on every rank."""
    if not _many():
        return
    device, ignored = next(network.parameters()).device, set(whole)
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, ignored_params=ignored)


def lost(error: RuntimeError) -> bool:
    """Whether an error says that another of several processes is gone."""
    return _many() and (isinstance(error, dist.DistError) or _GONE.search(str(error)) is not None)


def barrier() -> None:
    """Waits for all ranks."""
    if _many():
        dist.barrier()
