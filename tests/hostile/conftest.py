from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import stepdistill
from stepdistill.models.teacher import load_teacher

from ..models.test_sources import save_lora

RECIPE = {"method": "lcm", "student": {"lora": {"rank": 2}}, "steps": 2,
          "data": {"prompts": ["a red ring", "a blue square"], "batch": 2},
          "train": {"updates": 1}}


@pytest.fixture(scope="session")
def made(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, a run `run` of it, and its `export`."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_teacher, folder / "teacher")
    save_lora(folder / "lora")
    recipe = RECIPE | {"teacher": str(folder / "teacher"), "data": {"images": "shapes", "batch": 2}}
    threads = torch.get_num_threads()
    stepdistill.train(recipe, out=folder / "run")
    stepdistill.export(folder / "run", out=folder / "export")
    torch.set_num_threads(threads)
    assert load_teacher(folder / "teacher").name
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, in which the test stands."""
    shutil.copytree(made, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    settings = tmp_path / "world/export/stepdistill.json"
    settings.write_text(settings.read_text().replace(str(made), str(tmp_path / "world")))
    recipe = tmp_path / "world/run/recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(made), str(tmp_path / "world")))
    return tmp_path / "world"
