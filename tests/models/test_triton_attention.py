"""interpreted.py, where Triton interprets its kernels."""
from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.long
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed, whose interpreter runs the kernel")
def test_the_kernel_of_attention_and_its_tangent():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted.py"], cwd=HERE,
                          env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]
    assert "skipped" not in done.stdout and "failed" not in done.stdout
