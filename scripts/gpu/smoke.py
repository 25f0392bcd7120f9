"""The tests of tests/gpu on this card: draws, sampler, methods in three precisions, resume, exports, no waiting,
compile. A test that has passed is recorded at once, and does not run again."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import ROOT, Clock, Record, device_of, parser

FEW = "draws or sampled or (methods and fp16 and dmd2) or (resumed and lcm and bf16)"        # one of each kind
GRACE = 20                            # seconds in which pytest may end once it is told to


def main() -> None:
    args = parser(__doc__).parse_args()
    clock, device = Clock(args.seconds), device_of(args)
    record = Record("smoke", args, device)
    passed = [] if record.again else [name for name, found in record.figures.items() if found["outcome"] == "passed"]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        status = run(outcomes, passed, args.tiny, clock)
        for name, found in read(outcomes).items():
            record.add(name, found)
    record.close()
    print(f"{len(record.fresh)} tests have run; "
          f"{'all of them' if status in (0, 5) else 'not all of them passed, or not all ran'}")
    sys.exit(0 if status == 5 else status)               # 5: none was left


def run(outcomes: Path, passed: list[str], tiny: bool, clock: Clock) -> int:
    """pytest's status. Workers share the card where pytest-xdist is there. Once the time is over, pytest and its
    workers end."""
    workers = ["-n", "8", "--dist", "worksteal"] if not tiny and find_spec("xdist") else []
    skipped = [f"--deselect=tests/gpu/test_card.py::{name}" for name in passed]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu",
               *workers, *skipped,
               *(["-k", FEW] if tiny else [])]
    # and not those of a pytest around it
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env = {**own, "STEPDISTILL_GPU_OUTCOMES": str(outcomes), **({"STEPDISTILL_GPU_TINY": "1"} if tiny else {})}
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        return process.wait(timeout=max(1.0, clock.left))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    return 1


def read(outcomes: Path) -> dict[str, dict[str, Any]]:
    """test -> {outcome, seconds, reason of a failure or a skip}."""
    if not outcomes.is_file():
        return {}
    lines = [json.loads(line) for line in outcomes.read_text(encoding="utf-8").splitlines()]
    return {line["test"]: {key: value for key, value in line.items() if key != "test" and value != ""}
            for line in lines}


if __name__ == "__main__":
    main()
