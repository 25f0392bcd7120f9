"""What very many prompts and pictures cost a training: seconds to the first update, and memory from there on.

    python scripts/load.py                                    # 1,000,000 prompts, 100,000 pictures
    python scripts/load.py --prompts 30000 --pictures 2000

Each is a process of its own: a training of a tiny student of assets/shapes-sd on prompts in one text file, and one on
pictures with their captions in metadata.jsonl. It ends with status 1 where the first update came later than a minute,
or memory grew.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

# until the first update; bytes that memory may grow by from the fifth update to the last
SECONDS, GROWTH = 60.0, 64 << 20
COMMON: dict[str, Any] = {"teacher": "assets/shapes-sd", "student": {"lora": {"rank": 2}}, "steps": 2, "guidance": 2.0}
DATA: dict[str, dict[str, Any]] = {
    "prompts": {"method": "dmd2", "settings": {"gan_weight": 0.0, "critic_steps": 1}},
    "pictures": {"method": "lcm"},
}
COLOURS, SHAPES = ("red", "blue", "green", "white"), ("ring", "square", "cross", "disc")


def caption(i: int) -> str:
    return f"a {COLOURS[i % 4]} {SHAPES[i // 4 % 4]}, number {i}"


def made(kind: str, count: int, folder: Path) -> Path:
    """prompts.txt of as many different prompts, or a folder of as many pictures with their captions."""
    if kind == "prompts":
        path = folder / "prompts.txt"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{caption(i)}\n" for i in range(count))
        return path
    from PIL import Image
    path = folder / "pictures"
    for i in range(count):
        place = path / f"{i // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i % 256, i // 256 % 256, 128)).save(place / f"{i}.png", compress_level=1)
    with (path / "metadata.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"file_name": f"{i // 1000:04d}/{i}.png", "text": caption(i)}) + "\n"
                        for i in range(count))
    return path


def trained(kind: str, source: Path, updates: int, out: Path) -> dict[str, float]:
    """Trains so many updates. {"first": seconds until the first, "held", "peak": bytes after the fifth (or last) and at
    most later}."""
    began, process, held = time.perf_counter(), psutil.Process(), []
    first: list[float] = []

    def on_step(step: int) -> None:
        held.append(process.memory_info().rss)
        if not first:
            first.append(time.perf_counter() - began)

    import stepdistill
    data = {"prompts": str(source), "batch": 4} if kind == "prompts" else {"images": str(source), "batch": 4}
    stepdistill.train(COMMON | DATA[kind] | {"data": data, "train": {"updates": updates}}, out=out, on_step=on_step)
    settled = held[min(4, len(held) - 1):]
    return {"first": first[0], "held": settled[0], "peak": max(settled)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SOURCE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(trained(asked.one[0], Path(asked.one[1]), asked.updates, Path(folder) / "run")))
        return 0
    wrong = 0
    for kind, count in (("prompts", asked.prompts), ("pictures", asked.pictures)):
        with tempfile.TemporaryDirectory() as folder:
            source = made(kind, count, Path(folder))
            command = [sys.executable, __file__, "--one", kind, str(source), "--updates", str(asked.updates)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE,
                                              text=True).stdout.splitlines()[-1])
        growth = found["peak"] - found["held"]
        wrong += found["first"] > SECONDS or growth > GROWTH
        print(f"{count:,} {kind}: first update after {found['first']:.1f} s, {found['held'] / 2**20:,.0f} MiB held, "
              f"{growth / 2**20:,.1f} MiB more by update {asked.updates}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
