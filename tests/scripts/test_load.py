"""The benchmark of very many prompts and pictures, on few of them."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepdistill.data import prompts, text
from stepdistill.data.cache import Cache
from stepdistill.diffusion.contracts import Condition

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_it_measures_both(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "STEPDISTILL_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "scripts/load.py", "--prompts", "400", "--pictures", "60", "--updates", "6"],
                          cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=580)
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["400 prompts", "60 pictures"] and "first update after" in lines[
        1], done.stderr[-2000:]


def test_very_many_prompts_are_encoded_as_they_come_and_named_by_a_digest(tmp_path, monkeypatch):
    asked: list[int] = []

    def encode(texts: list[str]) -> Condition:
        asked.append(len(texts))
        return Condition(label=torch.tensor([len(one) for one in texts]),
                         null=Condition(label=torch.zeros(1, dtype=torch.int64)))

    many = tuple(f"number {i}" for i in range(200_000))
    found = text.stored_text(many, encode, "encoder", Cache(tmp_path))
    assert isinstance(found, text.LiveText) and sum(asked) == 1
    assert found(torch.tensor([3, 199_999])).label.tolist() == [8, 13] and asked[-1] == 2
    identity = prompts.ListedPrompts(many).identity
    assert len(str(identity)) < 100 and identity != prompts.ListedPrompts(many[:-1] + ("other",)).identity
    assert prompts.ListedPrompts(many[:3]).identity == {"prompts": list(many[:3])}
