"""Toy is trained and looked at; what is there for pictures alone says so, with the recipe's line."""
from __future__ import annotations

import pytest

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check
from stepdistill.run.plan import plan

SHORT = {"train.updates": 2, "train.warmup": 0, "data.batch": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return api.train("toy/lcm", out=tmp_path_factory.mktemp("toy") / "run", **SHORT)


@pytest.mark.parametrize("use", [
    lambda run: api.sample(run, "class 0"),
    lambda run: api.bench(run, out=run / "bench"),
    lambda run: api.export(run),
    lambda run: api.sample("assets/toy", "class 0"),
    lambda run: api.bench("assets/toy", out=run / "bench"),
])
def test_what_needs_a_pipeline_says_what_there_is_instead(run, use):
    with pytest.raises(RequestError, match=r"Toy has no pipeline in diffusers.* samples/, and `stepdistill "
                       r"verify METHOD`"):
        use(run)
    assert list((run / "samples").glob("*.png")) and not (run / "export").exists() and not (run / "bench").exists()


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("toy/lcm", {"evaluate.reference": "shapes"}, "--set evaluate.reference: evaluate.reference is shapes, but "
     "figures are of pictures"),
    ("toy/lcm", {"train.gradient_checkpointing": True}, "--set train.gradient_checkpointing: "
     "train.gradient_checkpointing is on, but"),
    ("toy/lcm", {"train.attention": "flash"}, "--set train.attention: train.attention is flash, but the teacher "
     "is Toy, whose network has no"),
    ("toy/add", {"discriminator": {"network": "assets/shapes-clip"}}, "discriminator.network is assets/shapes-clip, "
     "but it judges pictures, and the teacher is Toy"),
    ("toy/lcm", {"data.images": "shapes"}, "data.images is shapes, but the teacher is Toy, .* give its own folder, "
     "assets/toy"),
    ("toy/swiftbrush", {"data.prompts": ["class 0"]}, "data.prompts is .*, but the teacher is Toy"),
    ("toy/kd", {"data.pairs.prompts": "shapes"}, "data.pairs.prompts is shapes, but the teacher is Toy"),
    ("shapes/lcm", {"data.images": "assets/toy"}, "data.images is assets/toy, a folder of Toy, .* but the teacher "
     "assets/shapes-sd is none"),
    ("shapes/swiftbrush", {"data.prompts": "assets/toy"}, "data.prompts is assets/toy, a folder of Toy, .* prompts "
     "of your own"),
])
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(tmp_path, name, changes, message):
    with pytest.raises(RequestError, match=message):
        check(Recipe.load(name, changes))
    with pytest.raises(RequestError, match=message):
        api.train(name, out=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["toy/lcm", "shapes/guided"])
def test_there_is_nothing_to_plan_of(name):
    with pytest.raises(RequestError, match=r"teacher is assets/toy, a Toy, which there is nothing to plan of"):
        plan(Recipe.load(name, {"teacher": "assets/toy"}))


def test_the_command_says_where_the_pictures_lie(stepdistill, tmp_path):
    done = stepdistill("train", "toy/lcm", "--out", "run",
                       *(word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")))
    assert done.returncode == 0 and "its pictures: run/samples" in done.stdout and "export" not in done.stdout, (
        done.stderr)
    assert list((tmp_path / "run/samples").glob("*.png"))
