"""The tests of tests/gpu on this card: draws, sampler, methods in three precisions, resume, exports, no waiting,
compile."""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import ROOT, Record, device_of, parser


def main() -> None:
    args = parser(__doc__).parse_args()
    device = device_of(args)
    record = Record("smoke", args, device)
    if record.has("tests"):
        record.close()
        return
    with tempfile.TemporaryDirectory() as folder:
        status = run(Path(folder) / "report.xml", args.tiny)
        found = read(Path(folder) / "report.xml")
    record.add("tests", found)
    record.close()
    sys.exit(status)


def run(report: Path, tiny: bool) -> int:
    """pytest's status. Workers share the card where pytest-xdist is there; a tiny run takes one test of each kind."""
    few = ["-k", "draws or sampled or (methods and fp16 and dmd2) or (resumed and lcm and bf16)"] if tiny else []
    workers = ["-n", "4"] if not tiny and find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu",
               f"--junitxml={report}", *few, *workers]
    return subprocess.run(command, cwd=ROOT, env=os.environ
                          | ({"STEPDISTILL_GPU_TINY": "1"} if tiny else {})).returncode


def read(report: Path) -> dict[str, Any]:
    """{passed, failed, skipped, seconds, tests: {name: outcome}}."""
    tests: dict[str, str] = {}
    for case in xml.parse(report).iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        outcome = "passed" if bad is None and skipped is None else (f"failed: {bad.get('message', '')[:300]}"
                                                                    if bad is not None
                                                               else f"skipped: {skipped.get('message', '')[:200]}")
        tests[case.get("name", "")] = outcome
    counts = {kind: sum(outcome.startswith(kind) for outcome in tests.values())
              for kind in ("passed", "failed", "skipped")}
    seconds = sum(float(case.get("time", 0)) for case in xml.parse(report).iter("testcase"))
    return counts | {"seconds_of_tests": round(seconds, 1), "tests": tests}


if __name__ == "__main__":
    main()
