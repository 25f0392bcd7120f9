"""torch.compile by repeated block: what a network repeats is compiled once, and serves all blocks of its kind.

Every state is compiled by itself: each adapter and the base, with gradients and without, each size of a batch. Three
roles have more states than the eight that a function may have by default; past these torch goes on uncompiled and says
nothing.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import RequestError
from .discriminator import Discriminator
from .roles import Roles

OLDEST = "2.11"
STATES = 256                       # of one block, in one process


def compile_blocks(roles: Roles, backend: str = "inductor") -> None:
    """Compiles the repeated blocks of every network of these roles, at their first call in each state.

    RequestError for an earlier torch than was checked, for a network that names no repeated blocks, and for a
    discriminator that reads a feature inside of one.
    """
    if torch.__version__ < OLDEST:
        raise RequestError(f"torch is {torch.__version__}, and before {OLDEST} compiled blocks of roles that take "
                           "turns got wrong "
                           "gradients: take a newer torch, or train without train.compile")
    networks = [roles.teacher.network, *roles.networks.values()]
    for network in networks:
        if not vars(type(network)).get("_repeated_blocks"):
            raise RequestError(f"a {type(network).__name__} names no repeated blocks, which are what is compiled")
    for role in roles.values():
        if isinstance(role, Discriminator):
            check_features(role.role.network, role.features)
    torch._dynamo.config.recompile_limit = STATES
    torch._dynamo.config.accumulated_recompile_limit = 4 * STATES
    # Otherwise torch before 2.13 overlooks that an update trains what the one before froze, and gradients lack those
    # weights.
    torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
    torch._dynamo.config.use_recursive_dict_tags_for_guards = False
    for network in networks:
        network.compile_repeated_blocks(backend=backend, dynamic=False)


def check_features(network: nn.Module, features: Sequence[str]) -> None:
    """RequestError where one of these modules is a repeated block or lies in one."""
    for feature in features:
        path = feature.split(".")
        for length in range(1, len(path) + 1):
            block = ".".join(path[:length])
            if type(network.get_submodule(block)).__name__ in network._repeated_blocks:
                raise RequestError(f"the discriminator reads {feature}, and {block}, a "
                                   f"{type(network.get_submodule(block)).__name__}, "
                                   "is compiled, where a hook does not fire: name features outside of these blocks, or "
                                   "train "
                                   "without train.compile")
