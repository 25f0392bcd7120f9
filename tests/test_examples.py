"""docs/examples: every file, command and line of Python on a page is used as it stands, with small networks and few
updates."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import save_tiny

sys.path.insert(0, str(Path(__file__).parent / "models"))
from test_sources import save_lora  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs/examples"
SHORTER = {"updates: 1000": "updates: 3", "count: 4096": "count: 8", "batch: 16": "batch: 4",
           "checkpoint_every: 200": "checkpoint_every: 2",
           "rank: 64": "rank: 2", "train.updates=1500": "train.updates=5"}
RECIPE = ("method: lcm\nteacher: my-pipeline\nstudent: {lora: {rank: 2}}\nguidance: 2.0\nsteps: 4\ndata: {images: "
          "my-images, batch: 2}\ntrain: {updates: 3}\n")


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """What a reader of the pages has: a pipeline, a style, pictures, prompts and a recipe."""
    save_tiny(tmp_path / "my-pipeline")
    save_lora(tmp_path / "my-style")
    (tmp_path / "my-images").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / f"my-images/{i}.png")
        (tmp_path / f"my-images/{i}.txt").write_text(f"a picture, {i}")
    (tmp_path / "prompts.csv").write_text('prompt\n"a red ring, small"\na blue square\n')
    (tmp_path / "my.yaml").write_text(RECIPE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/stepdistill").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m stepdistill "$@"\n')
    (tmp_path / "bin/stepdistill").chmod(0o755)
    return tmp_path


def used(desk: Path, *command: str) -> str:
    environment = {**os.environ, "PATH": f"{desk / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                   "STEPDISTILL_CACHE": str(desk / "cache")}
    done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def follow(page: str, desk: Path) -> list[str]:
    """Uses the blocks of a page in their order, and returns what the commands printed."""
    text, printed = (PAGES / page).read_text(encoding="utf-8"), []
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    for language, rest, block in re.findall(r"```(\w+)([^\n]*)\n(.*?)```", text, re.DOTALL):
        if language == "yaml":
            (desk / re.findall(r"`([\w.-]+\.yaml)`:", text)[0]).write_text(block)
        elif "file=" in rest:
            # it is read through, and needs a queue to run
            printed.append(used(desk, "bash", "-n", "-c", block))
        else:
            printed.append(used(desk,
                                *(("bash", "-euc", block) if language == "sh" else (sys.executable, "-c", block))))
    return printed


@pytest.mark.long
def test_a_fine_tune_becomes_a_turbo_lora(desk):
    follow("fine_tune.md", desk)
    assert Image.open(desk / "in-diffusers.png").size == (16, 16) and (desk / "looks/report.html").is_file()
    settings = json.loads((desk / "turbo-lora/stepdistill.json").read_text())
    assert (settings["teacher_loras"] == [{"path": str(desk / "my-style"), "weight": 0.8}]
            and settings["proof"]["difference"] <= 1e-4)
    assert (desk / "lighthouse.png").is_file()


@pytest.mark.long
def test_a_batch_queue(desk):
    printed = follow("batch_queue.md", desk)
    lines = [json.loads(line) for line in (desk / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 5 and any("step 3" in text for text in printed)


@pytest.mark.long
def test_a_student_in_comfyui(desk):
    used(desk, "stepdistill", "train", "my.yaml", "--out", "runs/mine")
    follow("comfyui.md", desk)
    assert {"lcm-4step.safetensors", "workflow.json", "README.md"} <= {path.name for path in (desk / "comfy").iterdir()}


@pytest.mark.long
def test_features_of_ones_own(desk):
    (printed,) = follow("own_features.md", desk)
    rows = [line.split() for line in printed.splitlines()]
    assert ({row[0] for row in rows} == {"real", "shapes-lcm", "teacher:ddim"}
            and all(float(row[4]) <= float(row[3]) <= float(row[5]) for row in rows))


@pytest.mark.long
def test_the_notebook(desk):
    """Its cells, in their order, in one process; the demo's recipe with two updates."""
    cells = json.loads((PAGES / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "samples=400" in code and 'out="first-run")' in code
    code = code.replace('out="first-run")', 'out="first-run", **{"train.updates": 2, "data.count": 64, '
                        '"data.batch": 4})')
    used(desk, sys.executable, "-c", code)
    assert ((desk / "first-lora/pytorch_lora_weights.safetensors").is_file()
            and (desk / "first-bench/table.md").is_file())


def test_every_page_is_listed_and_tested():
    listed = set(re.findall(r"\]\(([\w.]+\.(?:md|ipynb))\)", (PAGES / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in PAGES.iterdir()} - {"README.md"}
    assert all(name in Path(__file__).read_text(encoding="utf-8") for name in listed)
