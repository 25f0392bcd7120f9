"""A discriminator: small trained heads on the features of another role's network. The only forward hooks of the
package."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.contracts import Condition
from ..diffusion.prediction import Prediction
from ..errors import RequestError
from ..methods.base import HeadKind
from .denoiser import Denoiser
from .heads import (
    Shape,
    channel_means,
    head,
    initialise,
    prompt_vector,
    slug,
    time_vector,
    token_heads,
    told_of,
    uncast,
)
from .recompute import StopForward


@contextmanager
def tap(network: nn.Module, names: Sequence[str], leave: bool = False) -> Iterator[dict[str, Any]]:
    """Collects what the modules `names` return in the one forward pass that happens inside: name -> its output.

    leave: the pass ends once all have spoken, and nothing after the `with` sees what it would have returned. The hooks
    are gone when backward computes activations again. ValueError where a module stayed silent; RequestError where one
    is compiled, or lies in a module that is: a hook added after compilation does not fire, and nothing says so.
    """
    found: dict[str, Any] = {}

    def collects(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = output
            if leave and len(found) == len(names):
                raise StopForward
        return hook

    modules = [_eager(network, name) for name in names]
    handles = [module.register_forward_hook(collects(name)) for name, module in zip(names, modules, strict=True)]
    try:
        yield found
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name in names if name not in found]:
        raise ValueError(f"{', '.join(silent)} of this {type(network).__name__} returned nothing in a forward pass: "
                         "features are read where the network calls its modules, once a pass")


def _eager(network: nn.Module, name: str) -> nn.Module:
    path = name.split(".")
    for length in range(len(path) + 1):
        module = network.get_submodule(".".join(path[:length]))
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            where = ".".join(path[:length]) or f"the whole {type(network).__name__}"
            raise RequestError(f"the feature {name!r} cannot be read: {where} is compiled, and a hook added after "
                               "compilation "
                               "does not fire. Compile only blocks in which no feature lies")
    return network.get_submodule(name)


def chosen(shapes: Mapping[str, Shape], names: Sequence[str]) -> dict[str, Shape]:
    """Of all features of a network those in `names`, in the order in which it runs. RequestError where there is no such
    one."""
    if not names:
        raise RequestError(f"a discriminator without features has no heads: name some of {', '.join(shapes)}")
    if unknown := [name for name in names if name not in shapes]:
        raise RequestError(f"a discriminator cannot read {', '.join(unknown)} of this network: its features are "
                           f"{', '.join(shapes)}")
    return {name: shape for name, shape in shapes.items() if name in names}


def paired(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Of heads that see the features of two states at once, joined channel by channel."""
    return {name: (2 * channels, *sides) for name, (channels, *sides) in shapes.items()}


class Discriminator(nn.Module):
    """discriminator(x_t, t, cond) -> logits, higher is more real; of K features, by the kind of heads:

    "pooled": (B, K), one for each, the mean over its positions.
    "tokens": K of them, (B, N) each, one at every position, of heads that are told the prompt and t; with `nodes` above
    1 of the head of its t.
    "channels": the same, of the mean over channels, which has no weights.

    role: whose network is read, as far as the last feature, under the role's own adapter; gradients flow to x_t and
    into that adapter as they do through the role. Its weights are no part of this module. The heads are float32 on any
    network, also under autocast; their first values are a function of (seed, feature), and none of their layers starts
    at zero.
    """

    def __init__(self, role: Denoiser, shapes: Mapping[str, Shape], seed: int = 0, kind: HeadKind = "pooled",
                 nodes: int = 1) -> None:
        super().__init__()
        self.role, self.features, self.kind, self.nodes = role, tuple(shapes), kind, nodes
        self.heads = self._heads(shapes, seed)
        self.to(next(role.network.parameters()).device)

    def _heads(self, shapes: Mapping[str, Shape], seed: int) -> nn.ModuleDict:
        if self.kind == "tokens":
            teacher = self.role.teacher
            width = prompt_vector(teacher.encode([teacher.null_prompt])).shape[-1]
            return token_heads(shapes, width + time_vector(torch.ones(1)).shape[-1], seed, self.nodes)
        with torch.random.fork_rng(devices=[]):
            made = {slug(name): head(shape) for name, shape in shapes.items()} if self.kind == "pooled" else {}
        heads = nn.ModuleDict(made)
        initialise(heads, seed)
        return heads

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor | list[Tensor]:
        """x_t (B, C, H, W), of videos (B, C, F, H, W); t (B,) float64 in [0, 1]."""
        with tap(self.role.network, self.features, leave=True) as found:
            self.role(x_t, t, cond)
        return self._read(self._maps(found, x_t), t, cond)

    def with_prediction(self, x_t: Tensor, t: Tensor,
                        cond: Condition | None = None) -> tuple[Prediction, Tensor | list[Tensor]]:
        """What the role predicts and the logits, of one whole pass."""
        with tap(self.role.network, self.features) as found:
            prediction = self.role(x_t, t, cond)
        return prediction, self._read(self._maps(found, x_t), t, cond)

    def pair(self, x_r: Tensor, r: Tensor, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Logits (B, K) of two states of one trajectory, of pooled heads made for `paired` shapes, in one pass of a
        doubled batch.

        Lin et al. 2024, arXiv:2402.13929, eq. 22.
        """
        both = torch.cat([x_r, x_t])
        with tap(self.role.network, self.features, leave=True) as found:
            self.role(both, torch.cat([r, t]), None if cond is None else Condition.cat([cond, cond]))
        maps = {name: torch.cat(m.chunk(2), dim=1) for name, m in self._maps(found, both).items()}
        return self._read(maps, t, cond)

    def _maps(self, found: Mapping[str, Any], x_t: Tensor) -> dict[str, Tensor]:
        return {name: self.role.teacher.feature_map(output, x_t).float() for name, output in found.items()}

    def _read(self, found: Mapping[str, Tensor], t: Tensor, cond: Condition | None) -> Tensor | list[Tensor]:
        maps = {slug(name): found[name] for name in self.features}
        with uncast(found[self.features[0]]):
            if self.kind == "channels":
                return [channel_means(m) for m in maps.values()]
            if self.kind == "pooled":
                return torch.stack([self.heads[name](m).flatten(1).mean(1) for name, m in maps.items()], dim=1)
            told = (told_of(cond, t),) if self.nodes == 1 else (told_of(cond, t), t)
            return [self.heads[name](m, *told) for name, m in maps.items()]
