"""Conditions of numbered prompts: encoded as they come, or looked up in a store where every prompt stands once."""
from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Callable, Mapping, Protocol, Sequence

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..diffusion.schedule import moved
from .cache import Cache, Store
from .prompts import Captions, ListedPrompts

PER_FILE = 500                    # one prompt of a large text encoder is a quarter of a megabyte
LIMIT = 8 << 30                   # bytes of embeddings that may go on disk before prompts are rather encoded as they
                                  # come
# different prompts beyond which a training would wait for minutes for the last of them
MANY = 40_000
log = logging.getLogger(__name__)

Encode = Callable[[list[str]], Condition]                 # a family's text encoder; the condition has its null


class Text(Protocol):
    """The prompts of numbered samples. indices: (B,) int64."""

    def __call__(self, indices: Tensor) -> Condition: ...
    def prompts(self, indices: Tensor) -> list[str]:
        """As they are written."""


@dataclass(frozen=True)
class LiveText:
    """Encodes each prompt when it is asked for: for endless prompts, and for more of them than a disk should hold."""

    source: Captions
    encode: Encode

    @torch.no_grad()
    def __call__(self, indices: Tensor) -> Condition:
        return self.encode(self.prompts(indices))

    def prompts(self, indices: Tensor) -> list[str]:
        return self.source.captions(indices)


@dataclass(frozen=True)
class StoredText:
    """row (N,) int64: the row of the store that sample i's prompt has; null: one row, shown to all samples."""

    store: Store
    row: Tensor
    null: Condition
    device: torch.device | str = "cpu"

    def __call__(self, indices: Tensor) -> Condition:
        rows = self.row[indices]
        fields = {name: moved(self.store.rows(name, rows), self.device) for name in self.store.names}
        return Condition(**fields, null=self.null.map(lambda one: one.expand(len(rows), *one.shape[1:])))

    def prompts(self, indices: Tensor) -> list[str]:
        return [self.store.texts[row] for row in self.row[indices].tolist()]


def stored_text(captions: Sequence[str], encode: Encode, encoder: object, cache: Cache,
                device: torch.device | str = "cpu",
                limit: int = LIMIT) -> Text:
    """The conditions of samples 0 .. N - 1, whose prompts are `captions`. Every different prompt is encoded once.

    encoder: what the embeddings depend on beside the prompts, in JSON: source, revision, fingerprint.
    """
    unique = list(dict.fromkeys(captions))
    with torch.no_grad():
        first = encode(unique[:1])
    if first.null is None:
        raise ValueError("encode must return a condition with its null, the encoding of the prompt that guidance "
                         "subtracts")
    tensors = _tensors(first)
    size = len(unique) * sum(tensor.nbytes for tensor in tensors.values())
    if size > limit or len(unique) > MANY:
        log.warning("%s different prompts would take %.1f GiB as embeddings: they are encoded as they come",
                    f"{len(unique):,}", size / 2**30)
        return LiveText(ListedPrompts(tuple(captions)), encode)

    def make(indices: Tensor) -> tuple[Mapping[str, Tensor], list[str]]:
        prompts = [unique[i] for i in indices.tolist()]
        return _tensors(encode(prompts)), prompts

    digest = hashlib.blake2b(json.dumps(unique).encode(), digest_size=16).hexdigest()
    store = cache.store("text", {"encoder": encoder, "prompts": digest}, len(unique), tensors, make, PER_FILE)
    number = {prompt: i for i, prompt in enumerate(unique)}
    null = first.null[:1].to(device).map(lambda one: one.float() if one.is_floating_point() else one)
    return StoredText(store, torch.tensor([number[caption] for caption in captions]), null, device)


def _tensors(cond: Condition) -> dict[str, Tensor]:
    return {name: value for name, value in vars(cond).items() if isinstance(value, Tensor)}
