"""What somebody else wrote, looked at before any library opens it: weights are safetensors whatever their file is
called, configs name no code, and no name or link leads out of its folder. Nothing but the beginnings of weights and the
text of configs is read."""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import RequestError

# bytes at most: of a config, of a vocabulary, of a header of safetensors
CONFIG, TABLE, HEADER = 4 << 20, 256 << 20, 100_000_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".pickletensor", ".joblib", ".h5", ".msgpack",
           ".npy", ".npz")
MADE_OF = {b"\x80": "a pickle", b"PK": "a zip archive, as torch.save writes pickles",
           b"\x1f\x8b": "a compressed archive",
           b"\x93NUMPY": "a NumPy file", b"GGUF": "a GGUF file"}
CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "custom_generate", "megatron_config")
"""Entries of configs by which libraries of the field import or fetch code."""
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
ANEW = "Save or download it anew, from where it is trusted"


def check_folder(folder: Path, parts: Iterable[str] | None = None) -> None:
    """RequestError for a model's folder in which something leads out of it, names code, or is a pickle with no
    safetensors beside it. parts: the folders in it that count, beside its own files; all of them unless given."""
    places = ([folder] if parts is None
              else [place for name in parts if (place := folder / plain(name, folder)).is_dir()])
    files = [path for path in folder.iterdir() if not path.is_dir()] if parts is not None else []
    for path in (*places, *files, *(path for place in places for path in sorted(place.rglob("*")))):
        check_link(path, folder)
        if path.is_file():
            check_file(path)
    for place in (place for place in places if place != folder):
        check_pickles(place)


def check_file(path: Path) -> None:
    """RequestError for a file of weights or a config that is not what its name says, or names code."""
    if path.suffix == ".safetensors":
        check_weights(path)
    elif path.name.endswith(".index.json"):
        _check_shards(path)
    elif path.name.endswith(("config.json", "model_index.json")):
        check_config(path)
    elif path.suffix in (".json", ".txt", ".model", ".jinja") and path.stat().st_size > TABLE:
        raise RequestError(f"{path} has {path.stat().st_size:,} bytes, and nothing that belongs beside a model "
                           f"has more than {TABLE:,}. {ANEW}")


def plain(name: object, folder: Path) -> str:
    """A name of something in a folder. RequestError for one that leads anywhere else."""
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        raise RequestError(f"{folder} names {name!r}, which is no name of something in that folder: a name has "
                           f"no slashes and no '..'. {ANEW}")
    return name


def check_link(path: Path, folder: Path) -> None:
    """RequestError for a link that leads out of a folder. The Hub's cache links what is in snapshots/COMMIT to blobs
    beside it."""
    if not path.is_symlink():
        return
    root, target = folder.resolve(), path.resolve()
    snapshot = next((place for place in (root, *root.parents) if place.parent.name == "snapshots"), root)
    inside = (root, *([snapshot.parent.parent / "blobs"] if snapshot.parent.name == "snapshots" else []))
    if not any(target.is_relative_to(place) for place in inside):
        raise RequestError(f"{path} is a link that leads out of {folder}, to {target}: copy the file to its place")


def check_weights(file: Path) -> None:
    """RequestError for what cannot be safetensors by its first bytes: the length of a header, and the header's
    brace."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(9)
    if made_of := next((what for sign, what in MADE_OF.items() if start.startswith(sign)
                        and not _is_header(start, size)), None):
        raise RequestError(f"{file} is no safetensors file but {made_of}. Pickles can run code and are never read: "
                           f"{ANEW[0].lower()}{ANEW[1:]}, as safetensors")
    if not _is_header(start, size):
        raise RequestError(f"{file} is damaged or cut short: it is no safetensors file by its first bytes, and "
                           f"has {size:,}. Copy or download it anew")


def _is_header(start: bytes, size: int) -> bool:
    length = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and 2 <= length <= min(HEADER, size - 8)


def check_pickles(folder: Path) -> None:
    """RequestError for a folder whose weights are pickles and nothing else."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise RequestError(f"{folder} holds its weights as {pickles[0]}, which is a pickle or may hold one. Pickles "
                           "can run code and are never read: name a model whose weights are safetensors, such as "
                           "one that was saved by save_pretrained")


def _check_shards(path: Path) -> None:
    table = read_config(path, TABLE).get("weight_map")
    if not isinstance(table, dict):
        raise RequestError(f"{path} is damaged: weight_map is no table of tensors and files. {ANEW}")
    for name in set(map(str, table.values())):
        if Path(plain(name, path.parent)).suffix != ".safetensors":
            if not path.name.endswith(".safetensors.index.json"):
                continue                               # of pickles, which nothing reads
            raise RequestError(f"{path} names {name}, which is no safetensors file. {ANEW}")


def check_config(path: Path) -> None:
    """RequestError for a config that names code, or a class by anything but its name."""
    for key, value in _entries(read_config(path)):
        if key in CODE and value or key in KERNELS and isinstance(value, str) and "/" in value:
            raise RequestError(f"{path} names code: {key} is {str(value)[:80]!r}. No code of a model's folder or "
                               "of the Hub is ever run, with no switch for it: name a model of classes that diffusers "
                               "and transformers have")
        if key == "_class_name" and isinstance(value, str) and not value.isidentifier():
            raise RequestError(f"{path} names the class {value[:80]!r}: a class is named by its name alone, with "
                               f"no path. {ANEW}")


def read_config(path: Path, most: int = CONFIG) -> dict[str, Any]:
    """A table of JSON. RequestError for what is none, and for more than `most` bytes."""
    size = path.stat().st_size
    if size > most:
        raise RequestError(f"{path} has {size:,} bytes, and such a file has at most {most:,}. {ANEW}")
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"{path} is damaged: {said}. {ANEW}") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path} is damaged: it holds a {type(found).__name__} where a table should be. {ANEW}")
    return found


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every entry of every table in a value of JSON."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield from one.items()
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


def check_header(metadata: dict[str, str] | None, file: Path) -> None:
    """RequestError where what a LoRA's file says of itself would make a loader import code."""
    for text in (metadata or {}).values():
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            continue                                   # a plain text; loaders read none but tables
        for key, value in _entries(said):
            if key.rpartition(".")[2] in CODE and value:
                raise RequestError(f"{file} names code in its header: {key} is {str(value)[:80]!r}. No code that "
                                   "a file names is ever run: take the LoRA from where it is trusted, or remove "
                                   "that entry")
