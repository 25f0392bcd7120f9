"""A discriminator: small trained heads on the features of another role's network. The only forward hooks of the
package."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.contracts import Condition
from ..diffusion.draws import key
from ..diffusion.prediction import Prediction
from ..errors import RequestError
from .denoiser import Denoiser
from .recompute import StopForward

WIDTH, GROUPS, LEAST = 128, 32, 4        # of a head: channels, groups of a normalisation, the side down to which it
                                         # pools
Shape = tuple[int, ...]                  # channels, height, width; of videos channels, frames, height, width


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


def head(shape: Shape) -> nn.Sequential:
    """Feature map (B, C, H, W) -> one logit a position, (B, 1, h, w) with h and w about LEAST for a map of this
    `shape`; of videos (B, C, F, H, W) -> (B, 1, f, h, w).

    At this width those on every block of SDXL together have 5 million parameters. Frames are an axis like height and
    width: laid beside each other in a map of two, those of one place would be far apart, and a head blind to motion.
    """
    channels, *sides = shape
    conv = nn.Conv2d if len(sides) == 2 else nn.Conv3d
    layers, side = [conv(channels, WIDTH, 1)], max(sides)
    while side > LEAST:
        layers += [nn.GroupNorm(GROUPS, WIDTH), nn.SiLU(), conv(WIDTH, WIDTH, 3, stride=2, padding=1)]
        side = (side + 1) // 2
    return nn.Sequential(*layers, nn.GroupNorm(GROUPS, WIDTH), nn.SiLU(), conv(WIDTH, 1, 1))


class Discriminator(nn.Module):
    """discriminator(x_t, t, cond) -> logits (B, K), one for each of K features; higher is more real.

    role: whose network is read, as far as the last feature, under the role's own adapter; gradients flow to x_t and
    into that adapter as they do through the role. Its weights are no part of this module. The heads are float32 on any
    network, also under autocast; their first values are a function of (seed, feature), and none of their layers starts
    at zero.
    """

    def __init__(self, role: Denoiser, shapes: Mapping[str, Shape], seed: int = 0) -> None:
        super().__init__()
        self.role, self.features = role, tuple(shapes)
        with torch.random.fork_rng(devices=[]):
            self.heads = nn.ModuleDict({slug(name): head(shape) for name, shape in shapes.items()})
        initialise(self.heads, seed)
        self.to(next(role.network.parameters()).device)

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x_t (B, C, H, W), of videos (B, C, F, H, W); t (B,) float64 in [0, 1]."""
        with tap(self.role.network, self.features, leave=True) as found:
            self.role(x_t, t, cond)
        return self._logits(found, x_t)

    def with_prediction(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> tuple[Prediction, Tensor]:
        """What the role predicts and the logits (B, K), of one whole pass."""
        with tap(self.role.network, self.features) as found:
            prediction = self.role(x_t, t, cond)
        return prediction, self._logits(found, x_t)

    def pair(self, x_r: Tensor, r: Tensor, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Logits (B, K) of two states of one trajectory, of heads made for `paired` shapes, in one pass of a doubled
        batch.

        Lin et al. 2024, arXiv:2402.13929, eq. 22.
        """
        both = torch.cat([x_r, x_t])
        with tap(self.role.network, self.features, leave=True) as found:
            self.role(both, torch.cat([r, t]), None if cond is None else Condition.cat([cond, cond]))
        return self._read({name: torch.cat(m.chunk(2), dim=1) for name, m in self._maps(found, both).items()})

    def _logits(self, found: Mapping[str, Any], x_t: Tensor) -> Tensor:
        return self._read(self._maps(found, x_t))

    def _maps(self, found: Mapping[str, Any], x_t: Tensor) -> dict[str, Tensor]:
        return {name: self.role.teacher.feature_map(output, x_t).float() for name, output in found.items()}

    def _read(self, maps: Mapping[str, Tensor]) -> Tensor:
        with uncast(maps[self.features[0]]):
            return torch.stack([self.heads[slug(name)](maps[name]).flatten(1).mean(1) for name in self.features], dim=1)


@torch.no_grad()
def initialise(heads: nn.ModuleDict, seed: int) -> None:
    """First values: a function of (seed, feature), and no layer at zero, which would pass no gradient on."""
    for path, parameter in heads.named_parameters():
        if parameter.ndim > 1:
            generator = torch.Generator().manual_seed(key(seed, "head", path))
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu")
                            / sqrt(parameter[0].numel()))
        elif path.endswith("bias"):
            parameter.zero_()


def uncast(x: Tensor) -> AbstractContextManager:
    """Within, nothing is cast to 16 bits. Tensors without values are never cast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def slug(name: str) -> str:
    """A module's name in a ModuleDict, which allows no dots."""
    return name.replace(".", "_")
