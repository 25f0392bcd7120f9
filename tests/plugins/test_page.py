"""docs/plugins.md is followed to the letter, and `verify` of a method from outside."""
from __future__ import annotations

import json
import shutil

import pytest

from stepdistill.errors import RequestError
from stepdistill.methods.trajectory.kd import KD
from stepdistill.proofs import run
from stepdistill.proofs.run import verify

from .conftest import COMMANDS


def test_what_nothing_proves_is_said(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "KINDS", ("identity",))
    found = verify("one_leap", seed=3, out=tmp_path / "out", plugins=mine)
    assert len(found["rows"]) == 2 and all(row["passed"] for row in found["rows"]) and "unproved" not in found
    shutil.rmtree(mine / "proofs")
    shutil.rmtree(mine / "recipes")
    bare = verify(seed=3, out=tmp_path / "out", plugins=mine)
    assert bare["rows"] == [] and [(one["kind"], one["why"].split()[-1]) for one in bare["unproved"]] == [
        ("identity", "proofs/one_leap.py"), ("convergence", "recipes/toy/one_leap.yaml")]


def test_a_method_of_this_process_alone_is_not_verified(tmp_path):
    import stepdistill
    stepdistill.register_method("mine", KD, title="x")
    with pytest.raises(RequestError, match="mine was registered in this process, and others measure it: put it "
                       "into a folder as methods/mine.py"):
        verify("mine", out=tmp_path / "out")


def test_a_plain_recipe_stands_in_for_the_contract(mine):
    from stepdistill.proofs.contract import recipe
    from stepdistill.recipe import Recipe
    from stepdistill.recipe.plugins import Folder
    Recipe.load("toy/one_leap", {"plugins": str(mine)})
    made = recipe("one_leap", Folder.open(mine))
    assert (made.teacher.base == "assets/shapes-sd" and made.data.kind == "pairs" and made.data.count == 4
            and made.plugins.folder == str(mine))


@pytest.mark.long
def test_the_page_to_the_letter(stepdistill, mine, tmp_path, tiny_teacher):
    """Each command as it stands there; the run that the bench names is one of a pipeline."""
    recipe = {"method": "one_leap", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
              "steps": 1, "data": {
        "pairs": {"prompts": "shapes", "steps": 4}, "count": 4, "batch": 2}, "train": {"updates": 2},
        "evaluate": {"prompts": ["a red ring"]}}
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe))
    done = stepdistill("train", "tiny.yaml", "--plugins", "mine", "--out", "runs/mine")
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        done = stepdistill(*command, timeout=1200)
        assert done.returncode == 0, (command, done.stderr)
    found = json.loads((tmp_path / "proved/verify.json").read_text())
    assert {row["kind"] for row in found["rows"]} == {"identity", "convergence", "contract"} and "unproved" not in found
    results = json.loads((tmp_path / "bench/results.json").read_text())
    assert all(row["metrics"]["contrast"] > 0 for row in results["rows"])
    done = stepdistill("export", "runs/mine")
    assert done.returncode == 0 and "proved and written" in done.stdout, done.stderr
