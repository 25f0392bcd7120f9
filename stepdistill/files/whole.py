"""Files that are there whole or not at all: written aside, forced to the disk, renamed."""
from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

PARTIAL = ".partial"


def aside_of(path: Path) -> Path:
    """Where a file or folder is written before it takes its name. Whoever writes it holds the lock of its folder."""
    return path.with_name(f".{path.name}{PARTIAL}")


def write_whole(path: Path, data: bytes) -> None:
    """A process that is killed leaves the old file or the new one; its folder is made where there is none. OSError
    leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Removes what killed writes left in a folder, if there is one. Only for who holds its lock."""
    for path in list(folder.glob(f".*{PARTIAL}")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def put_aside(path: Path, word: str = "damaged") -> Path:
    """Renames a file or folder that is damaged, or whatever the word says, so that nothing takes it for what it was,
    and nothing of it is lost. Its new name."""
    count = 1
    while (new := path.with_name(f"{word}-{count}-{path.name}")).exists():
        count += 1
    return path.rename(new)


def checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Forces a file, or the entries of a folder, to the disk. Windows cannot open folders and orders renames itself."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
