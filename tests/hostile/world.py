"""A small world for hostile inputs: a tiny pipeline, a Toy, an export and a run of them, each copied before it is
spoiled."""
from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file

MARK = "REACHED"                                    # the file that code of a hostile input would leave in its folder


class Bomb:
    """A pickle that leaves a mark where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.mark}'",)


def pickled(folder: Path) -> bytes:
    return pickle.dumps(Bomb(folder / MARK), protocol=2)


def torched(folder: Path) -> bytes:
    """As torch.save writes it: a zip archive with a pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(folder))
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


def header(length: int, text: bytes = b"{}") -> bytes:
    """The beginning of a file of safetensors whose header is said to be so long."""
    return struct.pack("<Q", length) + text


def whole(table: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return header(len(text), text) + data


def edited(path: Path, **entries: Any) -> None:
    """A JSON file with these entries; None leaves one out."""
    table = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps(table))


def lora(path: Path, said: Mapping[str, Any] | None = None) -> Path:
    """A LoRA of one layer of the tiny pipeline. said: its adapter's metadata."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, None if said is None else {"lora_adapter_metadata": json.dumps(said)})
    return path


__all__ = ["MARK", "Bomb", "edited", "header", "load_file", "lora", "pickled", "save", "torched", "whole"]
