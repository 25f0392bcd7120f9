"""The scripts for a GPU, small and on the CPU; and without a card, what they say."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

ROOT = Path(__file__).parents[2]
FIGURES = {"smoke": {"tests"}, "memory": {"tiny lcm lora", "tiny dmd2 lora"}, "throughput": {"tiny lcm", "tiny dmd2"}, "world": {"lcm 0"}}


def script(name: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(["bash", ROOT / "scripts/gpu" / f"{name}.sh", *args], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.long
@pytest.mark.parametrize("name", FIGURES)
def test_a_tiny_run_writes_a_record(name, tmp_path):
    done = script(name, "--tiny", OUT=str(tmp_path), STEPDISTILL_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert set(found["figures"]) == FIGURES[name] and {"device", "driver", "versions", "command", "date"} <= set(found)
    if name == "smoke":
        assert found["figures"]["tests"]["failed"] == 0 and found["figures"]["tests"]["passed"] == 4
    if name == "throughput":
        assert all(0.3 < each["ratio"] < 3 for each in found["figures"].values())


@pytest.mark.parametrize("name", ["memory", "first"])
def test_without_a_card_a_script_says_so_and_ends_with_2(name, tmp_path):
    done = script(name, OUT=str(tmp_path))
    assert done.returncode == 2 and "torch finds none here" in done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "scripts/gpu/configs").glob("*.json")), ids=lambda path: path.stem)
def test_a_config_makes_a_network_of_its_size(path):
    config = json.loads(path.read_text())
    with torch.device("meta"):
        network = getattr(diffusers, config["denoiser"]["_class_name"]).from_config(config["denoiser"])
    assert sum(p.numel() for p in network.parameters()) == config["parameters"]
