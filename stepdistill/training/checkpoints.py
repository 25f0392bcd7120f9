"""Checkpoints: folders of safetensors with their checksums, that exist whole or not at all."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import resources
from ..errors import RequestError, Stopped

CHECKSUMS = "checksums.json"
Tensors = Mapping[str, Mapping[str, Tensor]]       # "role-student", "optimizer-student" -> name -> tensor


def save(run_dir: Path, step: int, tensors: Tensors) -> Path:
    """Writes `checkpoints/step-000200` beside its final place, syncs it, and renames it. Returns the folder.

    Stopped if it cannot be written, with nothing changed of what was saved before.
    """
    final = run_dir / "checkpoints" / f"step-{step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({key: tensor.detach().contiguous() for key, tensor in group.items()},
                      partial / f"{name}.safetensors")
        sums = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
        (partial / CHECKSUMS).write_text(json.dumps({"step": step, "sha256": sums}, indent=1) + "\n", encoding="utf-8")
        resources.share(partial)
        for path in partial.iterdir():
            _sync(path)
        if final.exists():                          # left by a run that was resumed from an earlier step
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest(run_dir)
        raise Stopped(f"the checkpoint of step {step} could not be written to {final.parent}: {error}. "
                      f"{f'{kept.name} is kept' if kept else 'Nothing was saved before'}; make room and resume.") from error
    return final


def load(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All tensors of a checkpoint, by file stem. RequestError naming the file where one is missing or damaged."""
    return {Path(name).stem: _read(folder, name) for name in _sums(folder)}


def load_role(folder: Path, role: str) -> dict[str, Tensor]:
    """The state of one role, of a checkpoint folder. RequestError if it is not there or damaged."""
    return _read(folder, f"role-{role}.safetensors")


def checksum_of(folder: Path, role: str) -> str:
    """Of the file of one role's state."""
    return _sums(folder)[f"role-{role}.safetensors"]


def roles_in(folder: Path) -> list[str]:
    """Names of the roles that a checkpoint holds."""
    return [Path(name).stem.removeprefix("role-") for name in _sums(folder) if name.startswith("role-")]


def latest(run_dir: Path) -> Path | None:
    """The checkpoint of the greatest step, or None."""
    return max((run_dir / "checkpoints").glob("step-*"), key=step_of, default=None)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _sums(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, folder / CHECKSUMS, f"its list of checksums cannot be read ({error})") from error


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    sums, path = _sums(folder), folder / name
    if name not in sums:
        raise RequestError(f"{folder} holds no {name}; it holds {', '.join(sums)}")
    if not path.is_file():
        raise _damaged(folder, path, "the file is missing")
    if _checksum(path) != sums[name]:
        raise _damaged(folder, path, "its checksum differs from the one written when it was saved")
    return load_file(path)


def _damaged(folder: Path, path: Path, reason: str) -> RequestError:
    return RequestError(f"the checkpoint file {path} is damaged: {reason}. Remove the folder {folder} to go on from "
                        "the "
                        f"checkpoint before it.")


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Forces a file, or the entries of a folder, to the disk. Windows cannot open folders and orders renames itself."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
