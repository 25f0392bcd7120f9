"""Code that runs on two processes, as `torchrun` and `accelerate launch` start them."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
END = """
    import os, torch
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)             # gloo's threads sometimes abort an interpreter that is done (torch 2.13)
"""


def on_two_processes(code: str, folder: Path, *arguments: object) -> None:
    """Runs `code`, the body of a function with `sys` at hand, in `folder` on the CPU; the arguments are its
    sys.argv[1:].

    An error on either process fails the test.
    """
    body = "".join(f"    {line}\n" if line else "\n" for line in code.strip().splitlines())
    (folder / "worker.py").write_text(f'import sys\n\nif __name__ == "__main__":\n{body}{END}')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "worker.py"]
    done = subprocess.run([*command, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                            "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
