"""What a batch can come from: prompts alone, images encoded as they come, cached latents, the teacher's samples and
pairs."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Mapping, Protocol

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Pairs
from ..diffusion.schedule import moved
from ..errors import RequestError
from .cache import Cache, Store, StoreSpec
from .images import Images
from .prompts import Captions, all_captions
from .text import Encode, LiveText, Text, stored_text

SAMPLES_PER_FILE = 250            # a teacher's sample is dear: an interruption loses no more of them than this

Latents = Callable[[Tensor], Tensor]                      # indices (B,) -> scaled latents (B, C, H, W)
Generate = Callable[[Tensor, list[str]], Tensor]          # sample numbers (B,), their prompts -> scaled latents (B, C,
                                                          # H, W)
# the same -> noise (B, C, H, W), nodes (B, n, C, H, W)
GeneratePairs = Callable[[Tensor, list[str]], tuple[Tensor, Tensor]]


class Dataset(Protocol):
    """Numbered samples. count: how many, or None where they never end."""

    @property
    def count(self) -> int | None: ...
    def __getitem__(self, indices: Tensor) -> tuple[Tensor | None, Condition]:
        """indices: (B,) int64 on the CPU, below count. Returns x0 (B, ...), or None for prompts only, and the
        conditions."""

    def pairs(self, indices: Tensor) -> Pairs | None:
        """The ways that led the teacher to these samples, where they are kept."""

    def prompts(self, indices: Tensor) -> list[str]:
        """The texts of the conditions."""


@dataclass(frozen=True)
class Samples:
    """A dataset of functions of the sample's number."""

    count: int | None
    text: Text
    latents: Latents | None = None
    ways: Callable[[Tensor], Pairs] | None = None

    def __getitem__(self, indices: Tensor) -> tuple[Tensor | None, Condition]:
        return None if self.latents is None else self.latents(indices), self.text(indices)

    def pairs(self, indices: Tensor) -> Pairs | None:
        return None if self.ways is None else self.ways(indices)

    def prompts(self, indices: Tensor) -> list[str]:
        return self.text.prompts(indices)


@dataclass(frozen=True)
class Encoders:
    """A family's encoders. identity: what their results depend on, in JSON: source, revision, fingerprint of the
    weights.

    images: pixels (B, 3, H, W) in [-1, 1] -> scaled latents. device: where cached samples are handed out.
    """

    text: Encode
    images: Callable[[Tensor], Tensor]
    identity: object
    device: torch.device | str = "cpu"


def prompts_only(source: Captions, encoders: Encoders, cache: Cache) -> Samples:
    """No latents. The embeddings of finite prompts are cached; endless ones are encoded as they come."""
    return Samples(source.count, captioned(source, encoders, cache))


def live_images(images: Images, encoders: Encoders, cache: Cache) -> Samples:
    """Pictures are rendered or read, and encoded, whenever they are asked for."""

    @torch.no_grad()
    def latents(indices: Tensor) -> Tensor:
        return encoders.images(images.pixels(indices))

    return Samples(images.count, captioned(images, encoders, cache), latents)


def cached_images(images: Images, encoders: Encoders, cache: Cache) -> Samples:
    """Every picture is encoded once. RequestError for endless images."""
    if images.count is None:
        raise RequestError("data: a cache of images needs to know how many. Give Shapes a count, such as 20000, or "
                           "switch "
                           "the cache off.")
    identity = {"source": images.identity, "codec": encoders.identity}
    make = lambda indices: ({"latents": encoders.images(images.pixels(indices))}, images.captions(indices))
    return _stored(cache.store("images", identity, images.count, ("latents",), make), encoders, cache)


def teacher_samples(source: Captions, count: int, generate: Generate, made_by: Mapping[str, object], encoders: Encoders,
                    cache: Cache) -> Samples:
    """`count` samples of the teacher, made once. Sample i has prompt i, or i modulo the number of prompts.

    generate must be a function of the sample numbers alone, so that an interrupted cache goes on as it began; made_by
    says all that it depends on beside the teacher: seed, steps, guidance, solver.
    """
    if count < 1:
        raise RequestError(f"data: samples.count must be at least 1; found {count}")

    def make(indices: Tensor) -> tuple[Mapping[str, Tensor], list[str]]:
        prompts = _prompts(source, indices)
        return {"latents": generate(indices, prompts)}, prompts

    identity = {"source": source.identity, "made_by": dict(made_by), "teacher": encoders.identity}
    return _stored(cache.store("samples", identity, count, ("latents",), make, SAMPLES_PER_FILE), encoders, cache)


def teacher_pairs(source: Captions, spec: StoreSpec, generate: GeneratePairs, times: Tensor, encoders: Encoders,
                  cache: Cache) -> Samples:
    """The teacher's ways from noise to its samples, made once, as `teacher_samples` are. times: (n,) float64, of the
    nodes."""

    def make(indices: Tensor) -> tuple[Mapping[str, Tensor], list[str]]:
        prompts = _prompts(source, indices)
        noise, nodes = generate(indices, prompts)
        return {"noise": noise, "nodes": nodes}, prompts

    store = cache.fill(spec, make)

    def ways(indices: Tensor) -> Pairs:
        noise, nodes = (moved(store.rows(name, indices), encoders.device) for name in ("noise", "nodes"))
        return Pairs(noise, nodes, times.expand(len(indices), -1))

    text = stored_text(store.texts, encoders.text, encoders.identity, cache, encoders.device)
    return Samples(len(store), text, lambda indices: moved(store.rows("nodes", indices)[:, -1], encoders.device), ways)


def _prompts(source: Captions, indices: Tensor) -> list[str]:
    """Those of the samples that a teacher is to make: it begins anew at the end of a list."""
    return source.captions(indices if source.count is None else indices % source.count)


def _stored(store: Store, encoders: Encoders, cache: Cache) -> Samples:
    text = stored_text(store.texts, encoders.text, encoders.identity, cache, encoders.device)
    return Samples(len(store), text, lambda indices: moved(store.rows("latents", indices), encoders.device))


def captioned(source: Captions, encoders: Encoders, cache: Cache) -> Text:
    """The conditions of a source's texts: of a finite one encoded once and kept, of an endless one as they come."""
    if source.count is None:
        return LiveText(source, encoders.text)
    return stored_text(all_captions(source), encoders.text, encoders.identity, cache, encoders.device)
