"""FSDP2 for roles on one base: each process holds a part of the frozen weights, and gathers a block's while it runs.

Adapters, heads and averages stay whole on every process: they are small, and so their optimizers, gradients and
checkpoints are those of plain data parallelism. A run may begin sharded and go on on one process, or the other way
round.
"""
from __future__ import annotations

from torch import nn

from .. import parallel
from .roles import Roles


def shard(roles: Roles) -> None:
    """Shards the base over the processes; with one it stays as it is. From here on every process must take part in
    every pass.

    All trained roles are adapters.
    """
    parallel.shard_(roles.teacher.network, blocks(roles.teacher.network), roles.bank.parameters())


def blocks(network: nn.Module) -> list[nn.Module]:
    """What is gathered at once: the members of the network's own lists, such as down_blocks or transformer_blocks."""
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
