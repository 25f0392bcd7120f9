"""Where prompts come from: Shapes' endless captions, a text file, or a list in the recipe."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Mapping, Protocol, Sequence

import torch
from torch import Tensor

from ..diffusion.toy import Toy, is_toy
from ..errors import RequestError
from . import shapes
from .folders import CAPTIONS, caption_in, read_rows, read_text
from .tables import is_table, prompts_in

LISTS = (".txt", ".csv", ".jsonl")

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
        return {"prompts": hashlib.blake2b("\n".join(self.prompts).encode(), digest_size=16).hexdigest(),
                "count": self.count}

    def captions(self, indices: Tensor) -> list[str]:
        return [self.prompts[i] for i in indices.tolist()]


def all_captions(source: Captions) -> list[str]:
    """Every caption of a finite source, in order."""
    if source.count is None:
        raise ValueError("an endless source has no list of all its captions")
    return source.captions(torch.arange(source.count))


def texts_of(path: Path | None) -> list[str] | None:
    """Every prompt of a file; None without one. RequestError for what has no end."""
    if path is None:
        return None
    if is_toy(path):
        raise RequestError(f"prompts: '{path}' is Toy, whose classes are drawn without end: give a .txt file of one "
                           "prompt a line")
    return all_captions(open_prompts(path))


def open_prompts(spec: str | Path | Sequence[str], seed: int = 0, count: int | None = None) -> Captions:
    """spec: "shapes", "none", a .txt file with one prompt a line, a .csv, .jsonl or .parquet file with a column text,
    caption or prompt, a dataset of the Hub, or a list of prompts. seed and count are those of Shapes."""
    if spec == "shapes":
        return ShapesPrompts(seed, count)
    if spec == "none":
        return NoPrompts()
    if isinstance(spec, (str, Path)) and is_toy(spec):
        return Toy(Path(spec), seed, count)
    if isinstance(spec, (str, Path)):
        return ListedPrompts(_read(Path(spec)))
    if not spec or not all(isinstance(prompt, str) and prompt.strip() for prompt in spec):
        raise RequestError(f"prompts must be a list of one or more texts, none of them empty; found {list(spec)!r}")
    return ListedPrompts(tuple(spec))


def _read(path: Path) -> tuple[str, ...]:
    if is_table(path):
        return prompts_in(path)
    if path.suffix not in LISTS or not path.is_file():
        raise RequestError(f"prompts: '{path}' is no {', '.join(LISTS)} or .parquet file that exists. Give `shapes`, "
                           "such a file, a dataset of the Hub, or a list of prompts in brackets.")
    if path.suffix == ".txt":
        prompts = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    else:
        prompts = tuple(_prompt(row, number, path) for number, row in read_rows(path))
    if not prompts:
        raise RequestError(f"prompts: '{path}' has no prompt in it. Write one prompt a line.")
    return prompts


def _prompt(row: Mapping[str, object], number: int, path: Path) -> str:
    text = caption_in(row)
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"prompts: line {number} of '{path}' has no {', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]} "
                           "that is a text")
    return text.strip()
