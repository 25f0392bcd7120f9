"""What a run may be asked for when it goes on, and what begins anew."""
from __future__ import annotations

import json

import pytest
import torch

import stepdistill
from stepdistill.errors import RequestError
from stepdistill.files.lock import locked
from stepdistill.recipe import Recipe
from stepdistill.run import folder
from stepdistill.training import checkpoints

TOY = {"train.updates": 4, "train.checkpoint_every": 2, "train.log_every": 1, "train.warmup": 0,
       "train.decay": "constant", "data.batch": 16}


def trained(out, resume=False, **entries):
    return stepdistill.train("toy/lcm", out=out, resume=resume, **TOY | entries)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole") / "run")


def test_updates_are_raised_on_the_way_and_written_down(whole, tmp_path):
    run = trained(tmp_path / "run", "auto", **{"train.updates": 3})
    assert trained(run, "auto", **{"train.keep": 1}) == run
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    one, other = (checkpoints.load(checkpoints.latest(place)) for place in (run, whole))
    assert all(torch.equal(one[part][name], other[part][name]) for part in one for name in one[part])
    assert (Recipe.load(run / "recipe.yaml").train.updates == 4 and [path.name for path in checkpoints.found(run)]
            == ["step-000004"])
    assert [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()] == [
        {"step": 3, "entry": "train.updates", "was": 3, "now": 4},
        {"step": 3, "entry": "train.keep", "was": None, "now": 1}]
    assert (run / "samples/step-000003.png").is_file() and not (run / ".lock").exists()


@pytest.mark.parametrize(("entries", "message"), [
    ({"train.updates": 3}, "train.updates is 3, and .* was begun with 4: they can be raised"),
    ({"train.updates": 9, "train.decay": "cosine"}, "train.decay was 'constant', now 'cosine'.*What may change "
     "on the way is train.updates, train.lr"),
    ({"data.batch": 8, "train.lr": 1.0}, "data.batch was 16, now 8. Resume with"),
    ({"train.seed": 3}, "train.seed was 0, now 3")])
def test_what_cannot_change_is_refused_and_what_can_is_told(whole, entries, message):
    before = (whole / "recipe.yaml").read_bytes()
    with pytest.raises(RequestError, match=message):
        trained(whole, True, **entries)
    assert (whole / "recipe.yaml").read_bytes() == before


def test_updates_under_a_cosine_are_fixed(tmp_path):
    (tmp_path / "run").mkdir()
    begun = Recipe.load("toy/lcm", {"train.updates": 5})
    (tmp_path / "run/recipe.yaml").write_text(begun.dump())
    asked = Recipe.load("toy/lcm", {"train.updates": 6})
    with pytest.raises(RequestError, match="train.updates is 6, and .* falls to 0 at its last update"):
        folder.place(asked, tmp_path / "run", True)
    rate = Recipe.load("toy/lcm", {"train.updates": 5, "train.lr": 1e-5, "train.clip": 0.5, "evaluate.every": 7})
    assert folder.place(rate, tmp_path / "run", True) == (tmp_path / "run", rate, True)


def test_a_folder_without_a_checkpoint_is_begun_anew(whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "environment.json").write_text("{}")                          # a run that was killed after its first file
    (run / ".recipe.yaml.partial").write_text("method: l")
    (run / "metrics.jsonl").write_text('{"step": 1, "x": 9}\n')
    trained(run)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes() and not list(run.glob(".*"))
    with pytest.raises(RequestError, match="holds a run already: go on with it by --resume"):
        trained(run)


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for resume, message in ((False, "holds other files"), ("auto", "holds other files"), (True, "Leave --resume out")):
        with pytest.raises(RequestError, match=message):
            trained(tmp_path, resume)


def test_a_folder_is_held_by_one_run(tmp_path):
    with locked(tmp_path / "run/.lock", "it"), pytest.raises(RequestError, match="run is in use by process"):
        trained(tmp_path / "run")
    assert not list(tmp_path.iterdir())
