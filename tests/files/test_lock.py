"""One process at a time, and the dead hold nothing."""
from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepdistill.errors import RequestError
from stepdistill.files.lock import locked

ROOT = Path(__file__).parents[2]
HOLDS = """
import sys, time
from pathlib import Path
from stepdistill.files.lock import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(path: Path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(path), str(seconds)],
                               stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_by_name_and_the_dead_hold_nothing(tmp_path):
    path = tmp_path / "run/.lock"
    process = holder(path, 60)
    with pytest.raises(RequestError, match=rf"^the run is in use by process {process.pid} on {socket.gethostname()} "
                       r"since 20\d\d-"), locked(path, "the run"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()
    with locked(path, "the run"), pytest.raises(RequestError, match=f"process {os.getpid()} "), locked(path, "the run"):
        pass
    assert not path.exists()


def test_who_waits_is_told_once_and_goes_on(tmp_path, caplog):
    path = tmp_path / ".lock"
    process, start = holder(path, 1.5), time.monotonic()
    with locked(path, "the cache", wait=True):
        assert time.monotonic() - start > 1 and process.wait() == 0
    assert caplog.text.count(f"the cache is in use by process {process.pid}") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="has another call for it")
def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / ".lock", "it"):
        pass
    assert "has no locks (Function not implemented)" in caplog.text


def test_folders_that_stay_empty_are_removed(tmp_path):
    with locked(tmp_path / "a/b/.lock", "b"):
        assert (tmp_path / "a/b").is_dir()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a/b/.lock", "b"):
        (tmp_path / "a/file").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
