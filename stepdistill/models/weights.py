"""The files of weights in a pipeline's folder: which there are, and what they must hold. Only headers are read."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import RequestError
from .sources import Index, Source, check_safetensors

_FILE = re.compile(r"(?:diffusion_pytorch_)?model(?:-\d+-of-\d+)?(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")


def settled(source: Source, index: Index) -> Source:
    """The source of a local folder with the variant of its weights, where that is the only one there.

    RequestError for a variant that is not there, and where there are several and none is asked for.
    """
    if not Path(source.place).is_dir():
        return source
    held = {folder.name: variants for folder in folders(source, index) if (variants := _variants(folder))}
    every = sorted({variant for variants in held.values() for variant in variants if variant is not None})
    if source.variant is not None:
        if source.variant not in every:
            raise RequestError(f"{source} has no weights of the variant {source.variant}; it has {', '.join(every) or 'the plain ones alone'}")
        return source
    lacking = [variants for variants in held.values() if None not in variants]
    if not lacking:
        return source
    common = sorted(set.intersection(*lacking))
    if len(common) != 1:
        raise RequestError(f"{source} has no plain weights; its files are of the variants {' and '.join(every)}: choose one by variant")
    return replace(source, variant=common[0])


def folders(source: Source, index: Index) -> Iterator[Path]:
    """Of the components that a local pipeline lists."""
    listed = (name for name, made_by in index.items() if isinstance(made_by, list) and made_by[0] is not None)
    return (folder for name in listed if (folder := Path(source.place) / name).is_dir())


def check_files(source: Source) -> None:
    """RequestError for a damaged file of weights in a local pipeline."""
    if Path(source.place).is_dir():
        for file in sorted(Path(source.place).rglob("*.safetensors")):
            check_safetensors(file)


def _variants(folder: Path) -> set[str | None]:
    """Of its files of weights; None stands for the plain ones."""
    return {found["variant"] for path in folder.iterdir() if (found := _FILE.fullmatch(path.name))}
