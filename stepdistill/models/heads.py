"""Heads: small networks on one feature map each, and what they are told beside it."""
from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import pi, sqrt

import torch
from torch import Tensor, nn

from ..diffusion.contracts import Condition
from ..diffusion.draws import key
from ..diffusion.schedule import moved

WIDTH, GROUPS, LEAST = 128, 32, 4        # of a head: channels, groups of a normalisation, the side down to which it
                                         # pools
CLASS_WAVES, TIME_WAVES = 4, 4
Shape = tuple[int, ...]                  # channels, height, width; of videos channels, frames, height, width


def conv_of(shape: Shape) -> type[nn.Module]:
    return nn.Conv2d if len(shape) == 3 else nn.Conv3d


def head(shape: Shape) -> nn.Sequential:
    """Feature map (B, C, H, W) -> one logit a position, (B, 1, h, w) with h and w about LEAST for a map of this
    `shape`; of videos (B, C, F, H, W) -> (B, 1, f, h, w).

    At this width those on every block of SDXL together have 5 million parameters. Frames are an axis like height and
    width: laid beside each other in a map of two, those of one place would be far apart, and a head blind to motion.
    """
    channels, *sides = shape
    conv, side = conv_of(shape), max(sides)
    layers: list[nn.Module] = [conv(channels, WIDTH, 1)]
    while side > LEAST:
        layers += [nn.GroupNorm(GROUPS, WIDTH), nn.SiLU(), conv(WIDTH, WIDTH, 3, stride=2, padding=1)]
        side = (side + 1) // 2
    return nn.Sequential(*layers, nn.GroupNorm(GROUPS, WIDTH), nn.SiLU(), conv(WIDTH, 1, 1))


class TokenHead(nn.Module):
    """Feature map (B, C, H, W), of videos (B, C, F, H, W), and what it is told, (B, D) -> a logit at each position,
    (B, N), N the map's own positions in rows.

    The head of StyleGAN-T (Sauer et al. 2023, arXiv:2301.09515) with the convolution in the plane of LADD
    (arXiv:2403.12015): one tap, nine taps beside a skip, and the projection of Miyato & Koyama 2018, arXiv:1802.05637,
    eq. 4, at each position. Its batch norms are group norms, with which a sample's logits are its own; after a norm the
    scale of a convolution says nothing, which is what its spectral norms bound. Its width is ours.
    """

    def __init__(self, shape: Shape, told: int) -> None:
        super().__init__()
        conv = conv_of(shape)
        self.first = nn.Sequential(conv(shape[0], WIDTH, 1), nn.GroupNorm(GROUPS, WIDTH), nn.LeakyReLU(0.2))
        self.beside = nn.Sequential(conv(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(GROUPS, WIDTH), nn.LeakyReLU(0.2))
        self.last, self.told = conv(WIDTH, 1, 1), nn.Linear(told, WIDTH, bias=False)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        seen = self.first(x)
        seen = (seen + self.beside(seen)) / sqrt(2)
        projected = torch.einsum("bcn,bc->bn", seen.flatten(2), self.told(told)) / sqrt(WIDTH)
        return self.last(seen).flatten(1) + projected


class NodeHeads(nn.Module):
    """As a `TokenHead`, and given t (B,) -> what the head of the node that is nearest to t says, of those at 0, 1 / n
    .. 1 - 1 / n."""

    def __init__(self, nodes: int, shape: Shape, told: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(TokenHead(shape, told) for _ in range(nodes))

    def forward(self, x: Tensor, told: Tensor, t: Tensor) -> Tensor:
        """A head of no sample at all sees one for nothing, so that all have gradients on all ranks."""
        node = (t * len(self.each)).round().clamp(max=len(self.each) - 1)
        rows = [(node == i).nonzero()[:, 0] for i in range(len(self.each))]
        seen = []
        for each, own in zip(self.each, rows, strict=True):
            chosen = moved(own, x.device) if len(own) else slice(1)
            seen.append(each(x[chosen], told[chosen])[:len(own)])
        return torch.cat(seen)[moved(torch.cat(rows).argsort(), x.device)]


def channel_means(x: Tensor) -> Tensor:
    """A map (B, C, ...) -> a logit at each position, (B, N): a head without weights. Zhou et al. 2024,
    arXiv:2410.14919."""
    return x.mean(1).flatten(1)


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


def token_heads(shapes: Mapping[str, Shape], told: int, seed: int, nodes: int = 1) -> nn.ModuleDict:
    """A `TokenHead` by feature; of more than one node, `NodeHeads`."""
    of_feature = TokenHead if nodes == 1 else partial(NodeHeads, nodes)
    with torch.random.fork_rng(devices=[]):
        heads = nn.ModuleDict({slug(name): of_feature(shape, told) for name, shape in shapes.items()})
    initialise(heads, seed)
    return heads


def prompt_vector(cond: Condition) -> Tensor:
    """A prompt as one vector, (B, D): its pooled embedding, else the mean over its tokens, else waves of its class."""
    if cond.pooled is not None:
        return cond.pooled
    if cond.text is not None:
        return cond.text.mean(1)
    angles = cond.label[:, None] * torch.arange(1, CLASS_WAVES + 1, device=cond.label.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def time_vector(t: Tensor) -> Tensor:
    """Times (B,) -> waves of them, (B, 2 TIME_WAVES) float32: half a turn over [0, 1], a whole one, two and four."""
    angles = t[:, None] * pi * 2.0 ** torch.arange(TIME_WAVES, dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def told_of(cond: Condition, t: Tensor) -> Tensor:
    """By heads on the features of a network of noise levels: the prompt, and the level, (B, D + 2 TIME_WAVES)."""
    prompt = prompt_vector(cond).float()
    return torch.cat([prompt, moved(time_vector(t), prompt.device)], dim=1)


def uncast(x: Tensor) -> AbstractContextManager:
    """Within, nothing is cast to 16 bits. Tensors without values are never cast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def slug(name: str) -> str:
    """A module's name in a ModuleDict, which allows no dots."""
    return name.replace(".", "_")
