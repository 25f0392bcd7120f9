"""What the scripts for a GPU share: their arguments, the card, and the record of what was measured."""
from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "assets/gpu"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
GB = 1e9


def parser(doc: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tiny", action="store_true",
                      help="tiny networks on the CPU, in seconds; no record is kept in assets/")
    made.add_argument("--again", action="store_true", help="measure again what is recorded for this card")
    made.add_argument("--seconds", type=float, default=100.0, help="nothing new is begun after these")
    return made


def device_of(args: argparse.Namespace) -> torch.device:
    """The card, or with --tiny the CPU. Without a card the script ends with status 2."""
    if args.tiny:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sys.exit(_no_card())
    torch.cuda.init()
    return torch.device("cuda", torch.cuda.current_device())


def _no_card() -> int:
    print("this script measures a CUDA card, and torch finds none here: run it on a machine with one, or with --tiny "
          "on the CPU",
          file=sys.stderr)
    return 2


class Clock:
    """Whether there is time to begin something. It starts with the process."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Record:
    """assets/gpu/<name>.json: {device, driver, versions, command, date, figures}, copied to $OUT where that is set.

    Figures of another card are dropped, unless they are of `any_card`. A tiny run writes to a temporary folder, which
    it prints.
    """

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device, any_card: bool = False) -> None:
        folder = Path(tempfile.mkdtemp(prefix="gpu-tiny-")) if args.tiny else RECORDS
        self.path, self.again = folder / f"{name}.json", args.again
        self.head = {"device": _name(device), "driver": _driver(device), "versions": _versions(),
                     "command": shlex.join([f"scripts/gpu/{name}.sh", *sys.argv[1:]])}
        self.figures: dict[str, Any] = {}
        if self.path.is_file():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.figures = found["figures"] if any_card or found["device"] == self.head["device"] else {}
        self.fresh: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether nothing is left to do: measured in this run, or recorded and not asked for again."""
        return key in self.fresh or key in self.figures and not self.again

    def add(self, key: str, figures: Any) -> None:
        self.fresh.add(key)
        self.figures[key] = figures
        self.write()

    def write(self) -> None:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        text = json.dumps(self.head | {"date": date, "figures": self.figures}, indent=1) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path)
        if out := os.environ.get("OUT"):
            shutil.copy(self.path, Path(out) / self.path.name)

    def close(self) -> None:
        print(f"record: {self.path}")


def _name(device: torch.device) -> str:
    return (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"cpu: {platform.processor() or platform.machine()}")


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "cuda": torch.version.cuda
            or "none"} | {name: version(name) for name in PACKAGES}


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
