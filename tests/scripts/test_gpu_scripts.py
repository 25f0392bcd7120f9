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
SMOKE = ("test_draws_are_the_cpus", "test_a_student_is_sampled_as_on_the_cpu", "test_methods_train[dmd2-fp16]",
         "test_a_resumed_run_is_the_same_run_to_the_bit[lcm-bf16]")
FIGURES = {"smoke": set(SMOKE), "memory": {"tiny lcm lora", "tiny dmd2 lora"}, "throughput": {"tiny lcm", "tiny dmd2"},
           "world": {"lcm 0"}, "jvp": {"fp16 40", "fp32 40"}}


def script(name: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(["bash", ROOT / "scripts/gpu" / f"{name}.sh", *args], env=env, capture_output=True, text=True,
                          timeout=300)


@pytest.mark.long
@pytest.mark.parametrize("name", FIGURES)
def test_a_tiny_run_writes_a_record(name, tmp_path):
    done = script(name, "--tiny", "--seconds", "280", OUT=str(tmp_path), STEPDISTILL_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert set(found["figures"]) == FIGURES[name] and {"device", "driver", "versions", "command", "date"} <= set(found)
    if name == "smoke":
        assert {each["outcome"] for each in found["figures"].values()} == {"passed"}
    if name == "jvp":
        errors = [max(row["error"], row["tangent_error"]) for row in found["figures"].values()]
        assert errors[0] < 2e-3 and errors[1] < 1e-5
    if name == "throughput":
        assert all(0.3 < each["ratio"] < 3 for each in found["figures"].values())


@pytest.mark.parametrize("name", ["memory", "first"])
def test_without_a_card_a_script_says_so_and_ends_with_2(name, tmp_path):
    done = script(name, OUT=str(tmp_path))
    assert done.returncode == 2 and "torch finds none here" in done.stdout + done.stderr


def test_the_tiny_config_makes_a_network_of_its_size():
    config = json.loads((ROOT / "scripts/gpu/tiny.json").read_text())
    _, cls, values = config["components"]["unet"]
    with torch.device("meta"):
        network = getattr(diffusers, cls).from_config(values)
    assert sum(p.numel() for p in network.parameters()) == config["parameters"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd15", "sd35-medium", "flux2-klein-4b", "z-image"])
def test_a_folder_of_a_real_model_is_planned(name, tmp_path, monkeypatch):
    """Its encoders are thin and of the right width: conditions have the published shapes."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts/gpu"))
    import memory
    import pipelines
    folder = pipelines.write_pipeline(name, tmp_path / name)
    published = {"sd15": 0.86e9, "sd35-medium": 2.24e9, "flux2-klein-4b": 3.88e9, "z-image": 6.15e9}[name]
    assert memory.planned(memory.recipe((name, "dmd2", "lora"), tmp_path, folder)) > 2 * published / 1e9
