"""What several tests share."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))        # tests/tiny.py

# A shell's background job or nohup starts us deaf to some signals, and our children too; tests send them.
for number, handler in {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL,
                        "SIGTERM": signal.SIG_DFL}.items():
    if hasattr(signal, number) and signal.getsignal(getattr(signal, number)) is signal.SIG_IGN:
        signal.signal(getattr(signal, number), handler)

Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real StableDiffusionPipeline of tiny random networks."""
    from tiny import save_tiny
    return save_tiny(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def stepdistill(tmp_path: Path) -> Run:
    """Runs a command in a folder of its own: stepdistill("methods", "--json"). Status and output are those of a
    shell."""
    def run(*args: object, cwd: Path = tmp_path, timeout: float = 300) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1",
                       "STEPDISTILL_CACHE": str(tmp_path / "cache"), "PYTHONUTF8": "1"}
        return subprocess.run([sys.executable, "-m", "stepdistill", *map(str, args)], cwd=cwd, env=environment,
                              timeout=timeout,
                              capture_output=True, text=True)
    return run
