"""What a shell is told when a command is being typed, without torch."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("import sys\nsys.argv[0] = 'stepdistill'\nfrom stepdistill.cli import main\n"
        "try: main()\nfinally: print([m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules], "
        "file=sys.stderr)")


@pytest.mark.parametrize(("typed", "told"), [
    ("stepdistill tr", {"train"}), ("stepdistill train toy/lc", {"toy/lcm"}),
    ("stepdistill methods dmd", {"dmd", "dmd2"}),
    ("stepdistill export --che", {"--checkpoint"})])
def test_completions(typed, told):
    environment = {**os.environ, "_STEPDISTILL_COMPLETE": "complete_bash", "COMP_WORDS": typed,
                   "COMP_CWORD": str(len(typed.split()) - 1)}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert {*done.stdout.split()} == told and done.stderr.strip().endswith("[]"), done


def test_a_shell_is_told_how():
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run([sys.executable, "-c", CODE, "--show-completion", "bash"], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "_STEPDISTILL_COMPLETE=complete_bash" in done.stdout, done
