"""Where prompts come from: Shapes' endless captions, a text file, or a list in the recipe."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Sequence

import torch
from torch import Tensor

from ..diffusion.toy import Toy, is_toy
from ..errors import RequestError
from . import shapes

MANY = 100_000                    # prompts beyond which a cache says their digest rather than all of them


class Captions(Protocol):
    """Numbered texts. count: how many, or None where they never end; identity: what a cache of them is keyed by."""

    @property
    def count(self) -> int | None: ...
    @property
    def identity(self) -> dict[str, object]: ...
    def captions(self, indices: Tensor) -> list[str]:
        """indices: (B,) int64, below count. One text each."""


@dataclass(frozen=True)
class ShapesPrompts:
    """The captions of Shapes; sample i's is that of scene (seed, i)."""

    seed: int = 0
    count: int | None = None

    @property
    def identity(self) -> dict[str, object]:
        return {"prompts": "shapes", "seed": self.seed}

    def captions(self, indices: Tensor) -> list[str]:
        return shapes.captions(shapes.scenes(indices, self.seed))


@dataclass(frozen=True)
class NoPrompts:
    """For networks that are asked for nothing: "" without end."""

    count: int | None = None
    identity: dict[str, object] = field(default_factory=lambda: {"prompts": "none"})

    def captions(self, indices: Tensor) -> list[str]:
        return [""] * len(indices)


@dataclass(frozen=True)
class ListedPrompts:
    prompts: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.prompts)

    @property
    def identity(self) -> dict[str, object]:
        if self.count <= MANY:
            return {"prompts": list(self.prompts)}
        return {"prompts": hashlib.blake2b("\n".join(self.prompts).encode(), digest_size=16).hexdigest(), "count": self.count}

    def captions(self, indices: Tensor) -> list[str]:
        return [self.prompts[i] for i in indices.tolist()]


def all_captions(source: Captions) -> list[str]:
    """Every caption of a finite source, in order."""
    if source.count is None:
        raise ValueError("an endless source has no list of all its captions")
    return source.captions(torch.arange(source.count))


def open_prompts(spec: str | Path | Sequence[str], seed: int = 0, count: int | None = None) -> Captions:
    """spec: "shapes", "none", a .txt file with one prompt a line, or a list of prompts. seed and count are those of Shapes."""
    if spec == "shapes":
        return ShapesPrompts(seed, count)
    if spec == "none":
        return NoPrompts()
    if isinstance(spec, (str, Path)) and is_toy(spec):
        return Toy(Path(spec), seed, count)
    if isinstance(spec, (str, Path)):
        return ListedPrompts(_read_lines(Path(spec)))
    if not spec or not all(isinstance(prompt, str) and prompt.strip() for prompt in spec):
        raise RequestError(f"prompts must be a list of one or more texts, none of them empty; found {list(spec)!r}")
    return ListedPrompts(tuple(spec))


def _read_lines(path: Path) -> tuple[str, ...]:
    if path.suffix != ".txt" or not path.is_file():
        raise RequestError(f"prompts: '{path}' is not a .txt file that exists. Give `shapes`, the path of a .txt file "
                           "with one "
                           "prompt a line, or a list of prompts in brackets.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise RequestError(f"prompts: '{path}' is not UTF-8 text ({error}). Save it as UTF-8, one prompt a line.") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise RequestError(f"prompts: '{path}' has no prompt in it. Write one prompt a line.")
    return prompts
