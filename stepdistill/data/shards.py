"""WebDataset shards: tar files in which the files of one sample lie together and share the part of their name before
its first point."""
from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError
from .decoding import check_count, readable
from .folders import Reads, caption_in, checked, class_named, decoded
from .picture import KINDS, SUFFIXES, Size, read_picture


@dataclass(frozen=True)
class Place:
    """A picture's bytes: of the shard `file`, `size` of them from `offset` on."""

    file: Path
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        with self.file.open("rb") as opened:
            opened.seek(self.offset)
            return opened.read(self.size)


@dataclass(frozen=True)
class ShardImages:
    """The pictures of .tar files, which are indexed once and never unpacked. A sample is a picture and its caption:
    NAME.txt, or "text", "caption" or "prompt" of NAME.json; of a network that is told classes also NAME.cls."""

    size: Size
    places: tuple[Place, ...]
    texts: tuple[str, ...]
    sides: tuple[tuple[int, int], ...]
    key: str

    @classmethod
    def open(cls, spec: Path, size: Size, count: int | None = None, reads: Reads = "texts") -> ShardImages:
        """spec: a .tar file, or a folder of some. RequestError where a sample has no caption, and for what is no tar
        file."""
        shards = tuple(sorted(spec.rglob("*.tar"))) if spec.is_dir() else (spec,)
        stats = tuple((shard, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards)
        found = [sample for shard in stats for sample in _samples(*shard)]
        if not found:
            raise RequestError(f"images: '{spec}' holds no picture: shards hold {KINDS} files, each with its caption "
                               "in a .txt or .json file of the same name")
        check_count(count, len(found), spec)
        key = hashlib.blake2b(json.dumps([[shard.name, *rest] for shard, *rest in stats] + [count]).encode(),
                              digest_size=16).hexdigest()
        found = found[:count]
        kept = readable(key, [place.name for place, _ in found],
                        lambda i: read_picture(found[i][0].read(), name=found[i][0].name), str(spec))
        return cls(size, tuple(found[i][0] for i in kept), tuple(_caption(*found[i], reads) for i in kept),
                   tuple(kept.values()), key)

    @property
    def count(self) -> int:
        return len(self.places)

    @property
    def identity(self) -> dict[str, object]:
        return {"images": self.key, "files": self.count, "size": self.size}

    def captions(self, indices: Tensor) -> list[str]:
        return [self.texts[i] for i in indices.tolist()]

    def pixels(self, indices: Tensor) -> Tensor:
        return torch.stack([read_picture(self.places[i].read(), self.size, self.places[i].name)
                            for i in indices.tolist()])


Told = tuple[tuple[str, str], ...]                # (suffix, text) of the small files beside a picture


@cache
def _samples(shard: Path, size: int, changed: int) -> list[tuple[Place, Told]]:
    """The pictures of one shard, with what lies beside each; size and changed only say which shard it was."""
    samples: dict[str, tuple[list[Place], list[tuple[str, str]]]] = {}
    for member, held in _members(shard):
        stem, _, suffix = Path(member.name).name.partition(".")
        pictures, told = samples.setdefault(str(Path(member.name).parent / stem), ([], []))
        if held is None:
            pictures.append(Place(shard, member.offset_data, member.size, f"{shard.name}/{member.name}"))
        else:
            told.append((suffix.lower(), decoded(held, f"{shard.name}/{member.name}")))
    return [(picture, tuple(told)) for pictures, told in samples.values() for picture in pictures]


def _members(shard: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Its files: of texts with what they hold, of pictures without. Links and hidden files are passed over."""
    try:
        with tarfile.open(shard, "r:") as opened:
            for member in opened:
                suffix = Path(member.name).suffix.lower()
                if not member.isfile() or Path(member.name).name.startswith("."):
                    continue
                if suffix in SUFFIXES:
                    yield member, None
                elif suffix in (".txt", ".json", ".cls"):
                    yield member, opened.extractfile(member).read()
    except (OSError, tarfile.TarError) as error:
        raise RequestError(f"images: '{shard}' cannot be read as a tar file ({error}): shards are tar files, not "
                           "packed further") from None


def _caption(place: Place, told: Told, reads: Reads) -> str:
    if reads == "nothing":
        return ""
    beside = dict(told)
    if "txt" in beside:
        return checked(beside["txt"], place.name, "txt")
    if reads == "classes" and "cls" in beside:
        return class_named(beside["cls"].strip())
    if "json" in beside:
        try:
            row = json.loads(beside["json"])
        except (ValueError, RecursionError) as error:
            raise RequestError(f"images: the .json of '{place.name}' cannot be read ({error})") from None
        if isinstance(row, dict) and (text := caption_in(row)) is not None:
            return checked(text, place.name, "json")
    raise RequestError(f"images: '{place.name}' has no caption: a sample of a shard is a picture and, under the "
                       "same name, a .txt file or a .json file with text, caption or prompt; found "
                       f"{', '.join(f'.{suffix}' for suffix in beside) or 'nothing'} beside it")
