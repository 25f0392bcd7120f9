"""train.fsdp: a whole run on two processes that share the base is the run of one."""
from __future__ import annotations

import json

import pytest
import torch
from PIL import Image, ImageChops

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.training import checkpoints

from ..processes import on_two_processes
from ..unmagnified import unmagnified

RECIPE = {"method": "lcm", "student": {"lora": {"rank": 2}}, "steps": 2, "guidance": 3.0,
          "data": {"images": "shapes", "count": 8, "batch": 4}, "evaluate": {"every": 1},
          "train": {"updates": 2, "fsdp": True, "gradient_checkpointing": True, "log_every": 1}}
WORKER = """
import json
from stepdistill import api
from tests.unmagnified import unmagnified
with unmagnified():
    api.train(json.loads(sys.argv[1]), out="two")
"""


@pytest.mark.long
def test_two_processes_with_a_shared_base_are_one(tiny_teacher, tmp_path):
    recipe = RECIPE | {"teacher": str(tiny_teacher)}
    on_two_processes(WORKER, tmp_path, json.dumps(recipe))
    with unmagnified():
        api.train(recipe, out=tmp_path / "one")
    one, two = (checkpoints.load(checkpoints.latest(tmp_path / name))["role-student"] for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6)
    for name in ("samples/step-000001.png", "samples/step-000002.png"):
        pictures = [Image.open(tmp_path / run / name).convert("RGB") for run in ("one", "two")]
        assert max(high for _, high in ImageChops.difference(*pictures).getextrema()) <= 1


@pytest.mark.parametrize("changes, says", [
    ({"student": "full"}, "train.fsdp is on, which shards a frozen base, but the student trains all its weights"),
    ({"evaluate": {"reference": "shapes"}}, "evaluate.reference is shapes, but figures are taken of whole networks"),
])
def test_what_is_not_sharded_is_refused(tiny_teacher, tmp_path, changes, says):
    with pytest.raises(RequestError, match=says):
        api.train(RECIPE | {"teacher": str(tiny_teacher)} | changes, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
