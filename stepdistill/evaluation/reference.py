"""What generators are measured against: pictures of Shapes, or of a folder, and fresh real ones of the same make."""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Callable, Iterator, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..data.cache import default_root
from ..data.folders import captioned, captions_of, picture_files
from ..data.picture import named, read_picture
from ..data.shapes import Scenes, captions, render, scenes
from ..errors import RequestError
from ..files.digests import DIGEST, digest
from ..files.lock import LOCK, locked
from ..files.whole import write_whole
from .fd import Moments, Reference
from .features import Features
from .protocol import fingerprint

REFERENCE_SEED, HELD_OUT_SEED = 7, 5
SUBSET, BLOCK = 2_000, 250
REFERENCE_FILE = "reference.safetensors"      # beside features that ship
READER = 3                        # raise it when pictures of a folder are read otherwise


class Source(Protocol):
    """Pictures come as blocks (B, 3, H, W) in [-1, 1]. name says what they are; count is that of the reference."""

    name: str
    count: int
    captioned: bool

    def pictures(self) -> Iterator[Tensor]:
        """The reference."""

    def prompts(self, count: int) -> list[str]:
        """What generators are asked for unless the user says otherwise: captions, where it is `captioned`."""

    def real(self, count: int) -> Iterator[Tensor]:
        """Fresh pictures, none of the reference; where prompts() are captions, of exactly these."""

    def alike(self, prompts: int, each: int) -> Iterator[Tensor] | None:
        """prompts * each pictures: several real pictures of each of the first prompts(); None if there are none."""


class ShapesSource:
    """Procedural pictures of one seed as reference; those of another, and their captions, to test with."""

    captioned = True

    def __init__(self, count: int = 50_000) -> None:
        self.count = count
        self.name = f"shapes:{count}@{REFERENCE_SEED}"

    def pictures(self) -> Iterator[Tensor]:
        return (render(scenes(ids, REFERENCE_SEED)) for ids in torch.arange(self.count).split(BLOCK))

    def prompts(self, count: int) -> list[str]:
        return captions(scenes(torch.arange(count), HELD_OUT_SEED))

    def real(self, count: int) -> Iterator[Tensor]:
        return (render(scenes(ids, HELD_OUT_SEED)) for ids in torch.arange(count).split(BLOCK))

    def alike(self, prompts: int, each: int) -> Iterator[Tensor]:
        """A caption does not fix 15 numbers: these are drawn afresh, from ids that no prompt uses."""
        for ids in torch.arange(prompts * each).split(BLOCK):
            attributes = scenes(ids // each, HELD_OUT_SEED).attributes
            yield render(Scenes(attributes, scenes(2**32 + ids, HELD_OUT_SEED).uncaptioned))


class FolderSource:
    """The images of a folder, in an order scattered by their names: the first `held_out` are fresh, the rest
    reference. They are read as training reads them, at their own sizes; their captions, where they have some, are what
    generators are asked for."""

    def __init__(self, folder: Path, held_out: int) -> None:
        files, self.folder = picture_files(folder), folder
        self.files = sorted(files, key=lambda file: hashlib.sha256(str(file.relative_to(folder)).encode()).digest())
        if len(files) < 2 * held_out:
            raise RequestError(f"the reference {folder} holds {len(files)} images; {held_out} samples need at least "
                               f"{2 * held_out}, half of them kept apart as the row `real`")
        for file in files:                       # of a damaged one its name, before anything is loaded
            with named(file), Image.open(file):
                pass
        self.held_out, self.count = held_out, len(files) - held_out
        listed = fingerprint([READER, *([str(file.relative_to(folder)), file.stat().st_size] for file in files)])
        self.name = f"{folder.name}:{self.count}@{listed}"

    def pictures(self) -> Iterator[Tensor]:
        return (read_picture(file)[None] for file in self.files[self.held_out:])

    def prompts(self, count: int) -> list[str]:
        if not self.captioned:
            raise RequestError(f"the reference {self.folder} says nothing about prompts, since its images have "
                               "no captions: give a list of prompts, or captions in metadata.jsonl or in a .txt "
                               "beside each image")
        return captions_of(self.folder, self.files)[:count]

    @property
    def captioned(self) -> bool:
        """Whether its images have captions."""
        return captioned(self.folder, self.files)

    def real(self, count: int) -> Iterator[Tensor]:
        return (read_picture(file)[None] for file in self.files[:count])

    def alike(self, prompts: int, each: int) -> None:
        return None


def load_source(name: Path | str, samples: int) -> Source:
    """name: "shapes", "shapes:COUNT", or a folder of images."""
    kind, _, count = str(name).partition(":")
    if kind == "shapes" and (not count or count.isdecimal()):
        return ShapesSource(int(count)) if count else ShapesSource()
    if not Path(name).is_dir():
        raise RequestError(f"the reference {name} is neither `shapes`, nor `shapes:COUNT`, nor a folder of images")
    return FolderSource(Path(name), samples)


def load_reference(features: Features, source: Source, shipped: Path | None = None,
                   say: Callable[[str], None] = print) -> Reference:
    """From the file shipped beside the features if it was made by them, else from the cache, else computed and
    cached."""
    key = reference_key(features, source)
    if shipped is not None and shipped.is_file():
        found, reference = read_reference(shipped)
        if found == key:
            return reference
        say(f"{shipped} belongs to other features or pictures: not used")
    cached = default_root() / f"reference-{key}.safetensors"
    if (reference := _cached(cached, key, say)) is not None:
        return reference
    with locked(cached.with_name(f".{cached.stem}{LOCK}"), str(cached), wait=True):
        if (reference := _cached(cached, key, say)) is not None:
            return reference
        say(f"computing reference statistics: {source.count:,} pictures of {source.name} in {features.name} "
            f"(once; kept in {cached})")
        reference = compute_reference(features, source)
        save_reference(reference, cached, key)
    return reference


def _cached(file: Path, key: str, say: Callable[[str], None]) -> Reference | None:
    """What the cache holds of a key; None where there is nothing, or (which is said) something damaged."""
    if not file.is_file():
        return None
    try:
        found, reference = read_reference(file)
    except RequestError as error:
        say(f"{error} now")
        return None
    return reference if found == key else None


def ship_reference(features: Features, source: Source, folder: Path, say: Callable[[str], None] = print) -> Path:
    """Writes reference.safetensors into the features' folder, where load_reference looks first."""
    file = folder / REFERENCE_FILE
    save_reference(load_reference(features, source, None, say), file, reference_key(features, source))
    return file


def reference_key(features: Features, source: Source) -> str:
    return fingerprint([features.id, features.resize, source.name, "float32", SUBSET])


def compute_reference(features: Features, source: Source) -> Reference:
    found = torch.cat([features.images(block) for block in source.pictures()])
    halves = Moments.of(found[0::2]), Moments.of(found[1::2])
    return Reference(halves, found[:: max(1, len(found) // SUBSET)][:SUBSET].clone())


def save_reference(reference: Reference, file: Path, key: str) -> None:
    tensors = {"subset": reference.subset.contiguous()}
    for i, half in enumerate(reference.halves):
        tensors |= {f"{i}.count": torch.tensor(half.count), f"{i}.mean": half.mean, f"{i}.covariance": half.covariance}
    write_whole(file, save(tensors, {"key": key, DIGEST: digest(tensors, key)}))


def read_reference(file: Path) -> tuple[str, Reference]:
    """The key that the file was made under, and what it holds."""
    try:
        with safe_open(file, "pt") as saved:
            tensors, said = {name: saved.get_tensor(name) for name in saved.keys()}, saved.metadata()
        key = said["key"]
        if said.get(DIGEST, digest(tensors, key)) != digest(tensors, key):        # earlier versions wrote none
            raise ValueError("its numbers are not those that were written")
        halves = tuple(Moments(tensors[f"{i}.count"].item(), tensors[f"{i}.mean"], tensors[f"{i}.covariance"])
                       for i in range(2))
        return key, Reference(halves, tensors["subset"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{file} is no readable file of reference statistics ({error}): delete it, and it will be "
                           "computed anew") from error
