"""Recipes, runs and exports of earlier versions go on: see the README of each folder of tests/fixtures."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

import stepdistill
from stepdistill.export import open_export, read_settings
from stepdistill.files.whole import write_whole
from stepdistill.recipe import Recipe

OLD = Path(__file__).parent / "fixtures/version-0.1"
RUNS = ("run-toy", "run-shapes", "run-critic", "run-stages")
EXPORT_PROMPTS = ["a red ring", "a blue square"] * 2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def old(tmp_path):
    """old("run-toy"): a copy of a folder, which a test may change."""
    return lambda name: shutil.copytree(OLD / name, tmp_path / name)


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def grid(path: Path) -> torch.Tensor:
    """A row of four pictures as (4, 3, H, W) in [0, 1]."""
    return torch.stack((torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255).chunk(4, dim=2))


def drawn(folder: Path) -> torch.Tensor:
    """What the export's proof drew."""
    pipe, call = open_export(folder)
    return pipe(EXPORT_PROMPTS, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images


@pytest.mark.parametrize("path", [pytest.param(path, id=f"{path.parent.name}/{path.stem}")
                                  for folder in ("recipes", "resolved") for path in sorted((OLD / folder).iterdir())])
def test_recipes_load(path):
    written: dict[str, Any] = YAML(typ="safe").load(path.read_text())
    recipe, stages = Recipe.load(path), written.get("stages") or [{}]
    first = recipe.stages[0]
    assert first.method == stages[0].get("method", written["method"]) and first.teacher.base == written["teacher"]
    assert recipe.train.updates == written["train"]["updates"] and recipe.train.lr == written["train"]["lr"]
    assert recipe.data.batch == written["data"]["batch"]
    assert len(recipe.stages) >= len(stages)


@pytest.mark.parametrize("name", RUNS)
def test_runs_resume(old, name):
    """The third update is the one that was made then. A processor may sum in another order, hence the tolerance."""
    run = old(name)
    recorded = rows(run)
    assert stepdistill.train(run / "recipe.yaml", out=run, resume=True) == run
    found = rows(run)
    assert found[:2] == recorded[:2] and found[2].keys() == recorded[2].keys()
    assert found[2] == pytest.approx(recorded[2], rel=1e-3)
    assert (run / "checkpoints/step-000003").is_dir()


def test_a_resumed_run_is_exported_and_draws_what_it_drew(old, tmp_path):
    run = old("run-shapes")
    stepdistill.train(run / "recipe.yaml", out=run, resume=True)
    folder = stepdistill.export(run, guidance=2.0, out=tmp_path / "export")
    torch.testing.assert_close(drawn(folder), grid(OLD / "export/samples.png"), atol=2 / 255, rtol=0)


@pytest.mark.parametrize("name", ["run-critic", "run-stages"])
def test_unfinished_runs_are_exported(old, name, tmp_path):
    folder = stepdistill.export(old(name), out=tmp_path / "export", dtype="bfloat16")
    assert read_settings(folder)["steps"] == 2 and read_settings(folder)["dtype"] == "bfloat16"


def test_exports_load(tmp_path):
    settings = read_settings(OLD / "export")
    assert (settings["method"], settings["steps"]) == ("lcm", 4)
    assert settings["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    torch.testing.assert_close(drawn(OLD / "export"), grid(OLD / "export/samples.png"), atol=2 / 255, rtol=0)
    pictures = stepdistill.sample(OLD / "export", "a red ring", out=tmp_path / "ring.png")
    assert pictures[0].size == (32, 32) and Image.open(tmp_path / "ring.png").size == (32, 32)


def test_a_damaged_checkpoint_is_noticed(old):
    """The check above reads what lies there."""
    run = old("run-toy")
    path = run / "checkpoints/step-000002/role-student.safetensors"
    write_whole(path, path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(stepdistill.RequestError):
        stepdistill.train(run / "recipe.yaml", out=run, resume=True)
