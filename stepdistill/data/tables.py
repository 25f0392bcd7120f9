"""Pictures and prompts in tables that `datasets` reads: parquet files, and datasets of the Hub."""
from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import RequestError, first_lines
from .cache import default_root
from .decoding import check_count, readable
from .folders import CAPTIONS, Reads, caption_in, checked, class_named
from .picture import Size, read_picture

if TYPE_CHECKING:
    from datasets import Dataset

HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
PICTURES = ("image", "img", "jpg", "png", "picture")


def is_table(spec: str | Path) -> bool:
    """Whether it names a parquet file, a folder of some, or, since nothing lies there, a dataset of the Hub
    (OWNER/NAME@REVISION)."""
    path = Path(spec)
    if path.is_dir():
        return any(path.rglob("*.parquet")) and not any(path.rglob("*.tar"))
    return path.suffix == ".parquet" or (not path.exists() and HUB.fullmatch(str(spec)) is not None)


@dataclass(frozen=True)
class TableImages:
    """The rows of a table that have a picture. Its captions are the first of text, caption and prompt that it has; of a
    network that is told classes also the names of `label`."""

    table: Dataset
    column: str
    size: Size
    rows: tuple[int, ...]
    texts: tuple[str, ...]
    sides: tuple[tuple[int, int], ...]
    key: str

    @classmethod
    def open(cls, spec: str | Path, size: Size, count: int | None = None, reads: Reads = "texts") -> TableImages:
        """RequestError without the extra `data`, for a table without pictures or captions, and for one that cannot be
        had."""
        from datasets import Image

        table = load(str(spec))
        column = next((name for name in PICTURES if name in table.column_names), None)
        if column is None:
            raise RequestError(f"images: '{spec}' has no column of pictures ({', '.join(PICTURES)}); found "
                               f"{', '.join(table.column_names)}")
        check_count(count, len(table), spec)
        texts = _texts(table.select(range(count or len(table))), str(spec), reads, column)
        table = table.cast_column(column, Image(decode=False))
        # of datasets: it changes with the files and with every step
        key = f"{table._fingerprint}-{len(texts)}"
        decode = lambda i: read_picture(_held(table, column, i), name=f"{spec}, row {i}")
        kept = readable(key, list(map(str, range(len(texts)))), decode, str(spec))
        return cls(table, column, size, tuple(kept), tuple(texts[i] for i in kept), tuple(kept.values()), key)

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def identity(self) -> dict[str, object]:
        return {"images": self.key, "files": self.count, "size": self.size}

    def captions(self, indices: Tensor) -> list[str]:
        return [self.texts[i] for i in indices.tolist()]

    def pixels(self, indices: Tensor) -> Tensor:
        rows = [self.rows[i] for i in indices.tolist()]
        return torch.stack([read_picture(_held(self.table, self.column, i), self.size, f"row {i}") for i in rows])


def prompts_in(spec: str | Path) -> tuple[str, ...]:
    """The captions of a table, in its order. RequestError as for pictures."""
    return tuple(_texts(load(str(spec)), str(spec), "texts", None))


@cache
def load(spec: str) -> Dataset:
    """What `datasets` makes of it, kept under the cache's folder. No code of a dataset is run: `datasets` runs none,
    and takes no scripts."""
    try:
        import datasets
    except ImportError:
        raise RequestError(f"'{spec}' is a table, which the library `datasets` reads: pip install "
                           "'stepdistill[data]'") from None
    path, kept = Path(spec), str(default_root() / "datasets")
    name, _, revision = spec.partition("@")
    with _readable(spec):
        if path.exists():
            files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [str(path)]
            return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=kept)
        return datasets.load_dataset(name, split="train", revision=revision or None, cache_dir=kept)


@contextmanager
def _readable(spec: str) -> Iterator[None]:
    try:
        yield
    # of datasets, pyarrow, the Hub and the system, which share no base class
    except Exception as error:
        raise RequestError(f"'{spec}' cannot be read as a table: {first_lines(error)}. Give a parquet file, a folder "
                           "of some, or a dataset of the Hub with a split `train`") from error


def _held(table: Dataset, column: str, i: int) -> bytes | Path:
    """The picture of a row, as its file has it. RequestError where there is none."""
    found: dict[str, Any] | None = table[i][column]
    if not found or (found["bytes"] is None and found["path"] is None):
        raise RequestError(f"images: row {i} has no picture in its column {column!r}")
    if found["bytes"] is None and not Path(found["path"]).resolve().is_relative_to(default_root().resolve()):
        raise RequestError(f"images: row {i} names the file {found['path']}, which is none that came with the table: "
                           "a table holds its pictures themselves")
    return Path(found["path"]) if found["bytes"] is None else found["bytes"]


def _texts(table: Dataset, spec: str, reads: Reads, pictures: str | None) -> list[str]:
    from datasets import ClassLabel

    if reads == "nothing":
        return [""] * len(table)
    if reads == "classes" and "label" in table.column_names:
        label = table.features["label"]
        return [label.int2str(i) if isinstance(label, ClassLabel) else class_named(str(i)) for i in table["label"]]
    names = [name for name in CAPTIONS if name in table.column_names]
    if not names:
        raise RequestError(f"'{spec}' has no column of captions ({', '.join(CAPTIONS)}); found "
                           f"{', '.join(table.column_names)}")
    return [checked(caption_in({names[0]: text}), f"{spec}, row {i}", names[0])
            for i, text in enumerate(table[names[0]])]
