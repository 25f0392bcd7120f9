"""Checkpoints: folders of safetensors with their checksums, that exist whole or not at all."""
from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import parallel, resources
from ..errors import RequestError, Stopped
from ..files import records
from ..files.foreign import check_link, check_weights
from ..files.whole import aside_of, checksum, put_aside, sync

CHECKSUMS = "checksums.json"
NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,17})")
log = logging.getLogger(__name__)
T = TypeVar("T")
Tensors = Mapping[str, Mapping[str, Tensor]]       # "role-student", "optimizer-student" -> name -> tensor


def save(run_dir: Path, step: int, tensors: Tensors) -> Path:
    """Writes `checkpoints/step-000200` beside its final place, syncs it, and renames it. Returns the folder.

    Stopped if it cannot be written, with nothing changed of what was saved before.
    """
    final = run_dir / "checkpoints" / f"step-{step:06d}"
    partial = aside_of(final)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({key: tensor.detach().contiguous() for key, tensor in group.items()},
                      partial / f"{name}.safetensors")
        sums = {path.name: checksum(path) for path in sorted(partial.iterdir())}
        (partial / CHECKSUMS).write_text(json.dumps({"step": step, "sha256": sums}, indent=1) + "\n", encoding="utf-8")
        resources.share(partial)
        for path in partial.iterdir():
            sync(path)
        if final.exists():                          # left by a run that was resumed from an earlier step
            shutil.rmtree(final)
        os.replace(partial, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest(run_dir)
        raise Stopped(f"the checkpoint of step {step} could not be written to {final.parent}: {error}. "
                      f"{f'{kept.name} is kept' if kept else 'Nothing was saved before'}; make room "
                      "and resume.") from error
    return final


def prune(run_dir: Path, step: int, keep: int) -> None:
    """Removes the checkpoints before that of `step`, which was just saved, but for the keep - 1 greatest of them."""
    for folder in [folder for folder in found(run_dir) if step_of(folder) < step][keep - 1:]:
        gone = aside_of(folder)
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)                                # a name that is never taken for a checkpoint
        shutil.rmtree(gone)


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


def found(run_dir: Path) -> list[Path]:
    """The folders that are named as checkpoints are, the greatest step first; whatever else lies there is left
    alone."""
    return sorted((path for path in (run_dir / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)
                   and path.is_dir()),
                  key=step_of, reverse=True)


def latest(run_dir: Path) -> Path | None:
    """The checkpoint of the greatest step, or None. Its files are all there; that they hold what was written is checked
    when they are read."""
    return next((folder for folder in found(run_dir) if _is_whole(folder)), None)


def newest(run_dir: Path, use: Callable[[Path], T], aside: bool = False) -> tuple[Path, T] | None:
    """(the checkpoint of the greatest step for which `use` raises no RequestError, what it made of it); None without
    checkpoints.

    Those of greater steps are named in a warning and skipped; aside: and renamed, which all ranks ask for together.
    RequestError where there are checkpoints and none can be used.
    """
    refused: dict[Path, RequestError] = {}
    for folder in found(run_dir):
        try:
            made = use(folder)
        except RequestError as error:
            refused[folder] = error
            continue
        _skip(refused, folder, aside)
        return folder, made
    if refused:
        raise RequestError("\n".join(map(str, refused.values())))
    return None


def _skip(refused: Mapping[Path, RequestError], used: Path, aside: bool) -> None:
    if aside and refused:
        parallel.barrier()                             # every rank has seen them
    for folder, error in refused.items() if parallel.rank() == 0 else ():
        kept = f" and kept as {put_aside(folder).name}" if aside else ""
        log.warning("%s. It is skipped%s: %s is taken", str(error).rstrip("."), kept, used.name)
    if aside and refused:
        parallel.barrier()


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _is_whole(folder: Path) -> bool:
    try:
        return all((folder / name).is_file() for name in _sums(folder))
    except RequestError:
        return False


def _sums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    if not path.is_file():
        raise RequestError(f"the checkpoint file {path} is damaged: it is missing")
    said: records.Checksums = records.read(path, records.Checksums, "The checkpoint cannot be used")
    if said["step"] != step_of(folder):
        raise RequestError(f"the checkpoint {folder} is not what its name says: its {CHECKSUMS} is of step "
                           f"{said['step']}")
    for name in said["sha256"]:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise _damaged(path, f"it lists {name}, which is no safetensors file of its folder")
        check_link(folder / name, folder)
    return said["sha256"]


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    sums, path = _sums(folder), folder / name
    if name not in sums:
        raise RequestError(f"{folder} holds no {name}; it holds {', '.join(sums) or 'nothing'}")
    if not path.is_file():
        raise _damaged(path, "the file is missing")
    try:
        if checksum(path) != sums[name]:
            raise _damaged(path, "its checksum differs from the one written when it was saved")
        check_weights(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error


def _damaged(path: Path, reason: str) -> RequestError:
    return RequestError(f"the checkpoint file {path} is damaged: {reason}")
