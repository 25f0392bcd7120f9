"""One process writes into a folder at a time. The lock is the operating system's: it ends with its process, however
that ends."""
from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from ..errors import RequestError
from .records import checked
from .whole import sweep

LOCK = ".lock"
POLL = 0.5                             # seconds between two looks at a lock that is waited for
PLACE = 1 << 30                        # of the byte that Windows locks: beyond the text, which stays readable
TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)          # some network file systems
log = logging.getLogger(__name__)


class _Holder(TypedDict):
    process: int
    host: str
    since: str


@contextmanager
def locked(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path` while inside. what: names in messages what it guards. wait: until it is free;
    otherwise RequestError, "in use by process N on HOST since ...". Folders that were made for it and stay empty are
    removed again.
    """
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    handle = _take(path, what, wait)
    try:
        yield
    finally:
        _release(path, handle)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:            # it holds something by now
                break


@contextmanager
def cleared(folder: Path) -> Iterator[None]:
    """Holds a folder that is written into, without what killed writes left there. RequestError as of `locked`."""
    with locked(folder / LOCK, str(folder)):
        sweep(folder)
        yield


def _take(path: Path, what: str, wait: bool) -> int:
    told = False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:      # its folder was removed a moment ago, by who held it and wrote nothing
            continue
        free = _try(handle)
        if free and _is_same(path, handle):
            os.truncate(handle, 0)
            os.write(handle, json.dumps({"process": os.getpid(), "host": socket.gethostname(),
                                         "since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())
            return handle
        by = _holder(path)
        os.close(handle)
        if free:                       # the one before removed it while we took it
            continue
        if not wait:
            raise RequestError(f"{what} is in use by {by}: wait for it, or stop it, or name another folder")
        if not told:
            log.warning("%s is in use by %s: waiting for it", what, by)
            told = True
        time.sleep(POLL)


def _release(path: Path, handle: int) -> None:
    if sys.platform == "win32":        # where an open file cannot be removed
        os.close(handle)
        path.unlink(missing_ok=True)
    else:
        path.unlink(missing_ok=True)
        os.close(handle)


def _try(handle: int) -> bool:
    """Whether the lock was free and is ours now."""
    try:
        if sys.platform == "win32":
            import msvcrt
            os.lseek(handle, PLACE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        if error.errno not in LOCKLESS:
            os.close(handle)
            raise
        log.warning("the file system has no locks (%s): see to it that no second process writes there", error.strerror)
    return True


def _is_same(path: Path, handle: int) -> bool:
    """Whether the file that is locked is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        by: _Holder = checked(path.read_bytes(), _Holder)
        return f"process {by['process']} on {by['host']} since {by['since']}"
    except (OSError, ValueError):      # it has just been taken, or just been left
        return "another process"
