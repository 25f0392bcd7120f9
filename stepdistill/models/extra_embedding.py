"""Numbers that a network reads beside its time: the guidance scale w, the time r to land on, an exit.

Each is embedded as sinusoids. A linear layer without bias, zero at first, adds them to the network's own sinusoids of
time, ahead of the first linear layer of its time embedding: an input that some classes have (LCM's for w, Luo et al.
2023, arXiv:2310.04378) and that any network gets here.

What the layer adds at fixed numbers can be folded into the weights of the first linear layer W, so that a stock network
computes the same. Let s_j be the network's sinusoids at its j-th evaluation and c_j what the layer adds there. With u_i
. s_j = 1 where i = j and 0 elsewhere, the term sum_i (W c_i) u_i^T on W gives W c_j at the j-th evaluation: exact for
the k times that it is made for. Where c is one vector at all times, u . s(t) = 1 holds at all times with one u.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.schedule import moved
from ..errors import RequestError

WIDTH = 256                                        # of the sinusoids of one number


@dataclass(frozen=True)
class StockInput:
    """A number that a class of networks can read by itself. path: the layer that reads it, `width` numbers wide;
    config: the entries of the network's config that make it; out: the width of what it adds, that of the sinusoids
    unless given."""

    path: str
    width: int
    config: Mapping[str, Any]
    out: int | None = None


@dataclass(frozen=True)
class TimeEmbedding:
    """Where a network embeds its time. first: its first linear layer; sinusoids: the module whose output that layer
    reads, None where no module makes them, and no layer of ours can be put there.
    stock: the numbers that the class can read by itself. width: of the sinusoids, where the layer reads more than
    them. scale: by what the given time is multiplied before it gets there."""

    first: str
    sinusoids: str | None
    stock: Mapping[str, StockInput] = field(default_factory=dict)
    width: int | None = None
    scale: Callable[[nn.Module], float] = lambda network: 1.0

    def own(self, reads: Sequence[str]) -> tuple[str, ...]:
        """Of these numbers those that the class has no input for: one layer of ours reads them, in this order."""
        return tuple(name for name in reads if name not in self.stock)

    def layers(self, reads: Sequence[str]) -> dict[str, int]:
        """path -> width of the layers by which these numbers are read."""
        stock = {self.stock[name].path: self.stock[name].width for name in reads if name in self.stock}
        return stock | ({f"{self.sinusoids}.layer": WIDTH * len(own)} if (own := self.own(reads)) else {})

    def config(self, reads: Sequence[str]) -> dict[str, Any]:
        """Entries of the network's config, for the layers that the class makes."""
        return {key: value for name in reads if name in self.stock for key, value in self.stock[name].config.items()}

    def out(self, network: nn.Module, path: str) -> int:
        """The width of what the layer at `path` adds: of our own, that of the sinusoids."""
        return next((stock.out for stock in self.stock.values() if stock.path == path and stock.out),
                    self.width or network.get_submodule(self.first).in_features)


class ExtraEmbedding(nn.Module):
    """Takes the place of a network's sinusoids: timestep -> sinusoids + layer(the numbers' own sinusoids).

    The layer is put there as `layer`. Outside `reading` the network computes what it did before. Where a class embeds
    more numbers by the same module, such as a guidance scale, the time is the first, and to it alone the layer adds.
    """

    def __init__(self, sinusoids: nn.Module, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.sinusoids, self.layer = sinusoids, layer
        self.given: Tensor | None = None

    def forward(self, timestep: Tensor) -> Tensor:
        s, given, self.given = self.sinusoids(timestep), self.given, None
        return s if given is None else s + self.layer(moved(given, s.device)).to(s.dtype)


def install(network: nn.Module, path: str, layer: nn.Module | None = None) -> None:
    """Puts an ExtraEmbedding in the place of the sinusoids at `path`, unless one is there."""
    place, _, leaf = path.rpartition(".")
    if not isinstance(network.get_submodule(path), ExtraEmbedding):
        setattr(network.get_submodule(place), leaf, ExtraEmbedding(network.get_submodule(path), layer))


@contextmanager
def reading(network: nn.Module, path: str, numbers: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the network reads these numbers, (B,) each, beside its time. ValueError where it has no layer for
    them."""
    if not numbers:
        yield
        return
    place = network.get_submodule(path)
    if not isinstance(place, ExtraEmbedding):
        raise ValueError(f"this {type(network).__name__} has no layer that reads {', '.join(numbers)}: build its role "
                         "with them in `reads`")
    place.given = torch.cat([embedding(name, number) for name, number in numbers.items()], 1)
    try:
        yield
    finally:
        place.given = None


def embedding(name: str, number: Tensor, width: int = WIDTH) -> Tensor:
    """number (B,) -> (B, width) float32: sin and cos of 1000 x 10000^(-j / (width / 2 - 1)), where x is the number; of
    w, w - 1.

    LCM, arXiv:2310.04378. For w it is equal to the last bit to what a stock pipeline gives its network at
    guidance_scale = w: w - 1 is taken in float64, all else in float32, because the largest angles are thousands of
    turns.
    """
    scaled = (number.double().cpu() - (1 if name == "w" else 0)).float() * 1000
    half = width // 2
    frequencies = (torch.arange(half) * -(torch.tensor(10000.0).log() / (half - 1))).exp()
    angles = scaled[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(number.device)


# Folding --------------------------------------------------------------------------------------------------------------

def added(time: TimeEmbedding, state: Mapping[str, Tensor], numbers: Mapping[str, Tensor]) -> Tensor:
    """What the layers in `state` add to the sinusoids at these numbers, (k,) each, in the order of `reads`: (k, D)
    float64."""
    own = {name: numbers[name] for name in time.own(tuple(numbers))}
    parts = [(time.stock[name].path, {name: number}) for name, number in numbers.items() if name in time.stock]
    parts += [(f"{time.sinusoids}.layer", own)] if own else []
    return sum(torch.cat([embedding(name, number) for name, number in read.items()],
                         1).double() @ state[f"{path}.weight"].double().T
               for path, read in parts)


def fold(added: Tensor, weight: Tensor, s: Tensor, always: Tensor) -> tuple[Tensor, Tensor]:
    """(a (n, D), b (O, n)), float32: W + b a reads the plain sinusoids as the first linear layer W reads them with what
    is added.

    added: (k, D) float64, at each of k evaluations; weight: W (O, D) float64; s: the network's sinusoids at those
    evaluations, (k, D) float64; always: at all times that it knows, (N, D). One and the same vector at all evaluations
    is folded with n = 1 for any time; several with n = k for these times alone. RequestError where the sinusoids do not
    allow it.
    """
    if (added == added[:1]).all():
        return constant(always)[None].float(), (weight @ added[0])[:, None].float()
    return selectors(s).float(), (weight @ added.T).float()


def selectors(s: Tensor, tolerance: float = 1e-5) -> Tensor:
    """The smallest u (k, D) with u_i . s_j = 1 where i = j, else 0, for sinusoids s (k, D) float64 of k different
    times.

    RequestError where float32 weights would be off by more than the tolerance: times that are too close to be told
    apart.
    """
    u = torch.linalg.lstsq(s, torch.eye(len(s), dtype=s.dtype)).solution.T
    error = (u.float().double() @ s.T - torch.eye(len(s), dtype=s.dtype)).abs().max().item()
    if not error <= tolerance:
        raise RequestError(f"the time embedding of this network does not tell these {len(s)} times apart well enough: "
                           f"{error:.1e} off "
                           f"where {tolerance:.0e} is allowed, so what the student reads beside its time cannot be "
                           "folded into weights")
    return u


def constant(s: Tensor, tolerance: float = 1e-5) -> Tensor:
    """The u (D,) that minimises |s u - 1|^2 for s (N, D) float64. RequestError if no u comes within the tolerance.

    The slowest sinusoids span a constant. The ridge of 1e-12 keeps u small (about 1 / D), so that float32 products stay
    as exact as the network's own.
    """
    gram = s.T @ s / len(s) + 1e-12 * torch.eye(s.shape[1], dtype=s.dtype)
    u = torch.linalg.solve(gram, s.mean(0))
    error = (s @ u - 1).abs().max().item()
    if not error <= tolerance:
        raise RequestError(f"the time embedding of this network cannot carry a constant: {error:.1e} off where "
                           f"{tolerance:.0e} is needed, so its guidance cannot be folded into a LoRA; "
                           "export with --to pipeline")
    return u
