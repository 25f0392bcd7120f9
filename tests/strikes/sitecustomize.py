"""Imported by every Python whose PYTHONPATH names this folder: it dies, as of SIGKILL, at one call that brings
something to the disk.

STRIKE="fsync 7" kills the process at its seventh os.fsync: what is written aside is not whole yet; "replace 2" at its
second os.replace or rename, before the new file takes its name; "rmtree 1" at a removal. STRIKES=FILE leaves there how
many of each there were.
"""
from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
from pathlib import Path

counts = {"fsync": 0, "replace": 0, "rmtree": 0}
kind, _, number = os.environ.get("STRIKE", "").partition(" ")
mine = os.environ.get("RANK", "0") == "0"            # of several processes the one that writes


def counted(name, call):
    def instead(*arguments, **options):
        counts[name] += 1
        if mine and kind == name and counts[name] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return instead


os.fsync = counted("fsync", os.fsync)
os.replace, os.rename = counted("replace", os.replace), counted("replace", os.rename)
shutil.rmtree = counted("rmtree", shutil.rmtree)
if mine and "STRIKES" in os.environ:
    atexit.register(lambda: Path(os.environ["STRIKES"]).write_text(json.dumps(counts)))
