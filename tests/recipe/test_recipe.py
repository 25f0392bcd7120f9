"""What a recipe accepts, and how it says no: file, line, what was found, what would be right."""
from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepdistill.errors import RequestError
from stepdistill.methods import load_method
from stepdistill.recipe import Recipe
from stepdistill.recipe.catalogue import builtin, find
from stepdistill.recipe.yaml import Source, parse_set
from stepdistill.run.checks import configured, learning_rates
from stepdistill.run.plan import plan
from stepdistill.run.setup import setup

GOOD = """\
method: lcm
teacher: {teacher}
student: {{lora: {{rank: 8}}}}
guidance: [2.0, 5.0]
steps: 4
settings: {{nodes: 50}}
data:
  images: shapes
  batch: 4
train:
  updates: 10
  lr: 1e-3
"""


@pytest.fixture
def write(tmp_path: Path, tiny_teacher: Path):
    def write(old: str = "", new: str = "") -> Path:
        text = GOOD.format(teacher=tiny_teacher)
        assert old in text
        path = tmp_path / "mine.yaml"
        path.write_text(text.replace(old, new))
        return path
    return write


def refusal(path: Path, **overrides) -> str:
    with pytest.raises(RequestError) as caught:
        Recipe.load(path, overrides).method_settings()
    return str(caught.value)


def test_a_good_recipe_is_read_with_its_defaults(write):
    recipe = Recipe.load(write())
    assert recipe.student.lora.rank == 8 and recipe.guidance == (2.0, 5.0) and recipe.train.lr == 1e-3
    assert recipe.train.clip == 1.0 and recipe.data.kind == "images"


@pytest.mark.parametrize(("old", "new", "line", "message"), [
    ("steps: 4", "stpes: 4", 5, "did you mean steps?"),
    ("rank: 8", "rnak: 8", 3, "student.lora.rnak is no entry of student.lora; did you mean rank?"),
    ("nodes: 50", "nodez: 50", 6, "did you mean nodes?"),
    ("method: lcm", "method: lcn", 1, "did you mean lcm?"),
    ("steps: 4", "steps: 0", 5, "steps is 0; it should be at least 1"),
    ("steps: 4", "steps: four", 5, "steps is 'four'; it should be a whole number"),
    ("steps: 4", "steps: 4.5", 5, "it should be a whole number"),
    ("lr: 1e-3", "lr: -1", 12, "train.lr is -1; it should be above 0"),
    ("lr: 1e-3", "precision: fp8", 12, "'bf16' or 'fp16'"),
    ("  lr: 1e-3", "  ema: 1.0", 12, "below 1"),
    ("guidance: [2.0, 5.0]", "guidance: [5.0, 2.0]", 4, "from low to high"),
    ("guidance: [2.0, 5.0]", "guidance: 0.5", 4, "at least 1"),
    ("student: {lora: {rank: 8}}", "student: lora", 3, "should be full, or {lora: {rank: 32}}"),
    ("nodes: 50", "nodes: many", 6, "settings.nodes is 'many'"),
    ("nodes: 50", "nodes: 0", 6, "settings: nodes must be at least 1, and at most 10,000; found 0"),
    ("{nodes: 50}", "\n  nodes: 50\n  skip: 51", 8, "settings: skip must be from 1 to nodes = 50; found 51"),
    ("nodes: 50", "huber_c: .nan", 6, "settings.huber_c is nan; it should be a finite number"),
    ("lr: 1e-3", "lr: .inf", 12, "train.lr is inf; it should be a finite number"),
    ("guidance: [2.0, 5.0]", "guidance: .nan", 4, "guidance is nan; it should be a finite number"),
    ("guidance: [2.0, 5.0]", "guidance: [2.0, .inf]", 4, "should be a finite number, or a range of two"),
    ("images: shapes", "prompts: shapes", 8, "lcm trains on images or samples"),
    ("  images: shapes\n", "", 7, "one source, images, prompts, samples or pairs; found none"),
    ("batch: 4", "batch: 4\n  cache: true", 10, "endless"),
    ("images: shapes", "pairs: {prompts: shapes}", 7, "pairs without a count"),
    ("images: shapes", "count: 8\n  pairs:\n    prompts: shapes\n    nodes: 2", 11,
     "data.pairs.nodes is 2, which does not divide the 25 steps"),
    ("images: shapes", "pairs: {prompts: shapes, ndoes: 5}", 8, "data.pairs.ndoes is no entry of data.pairs; did "
     "you mean nodes?"),
    ("images: shapes", "images: shapes\n  pairs: {prompts: shapes}", 7, "found images and pairs"),
    ("updates: 10", "updates: 10\n  accumulate: 3", 12, "does not divide"),
    ("steps: 4", "steps: 4\nsteps: 5", 6, "steps"),
    ("steps: 4", "steps: [4", 6, "no valid YAML"),
])
def test_a_bad_recipe_is_refused_with_its_line(write, old, new, line, message):
    found = refusal(write(old, new))
    assert f"mine.yaml:{line}:" in found and message in found


@pytest.mark.parametrize(("method", "changes", "message"), [
    ("lcm", {"settings.nodes": 0}, "--set settings.nodes: settings: nodes must be at least 1, and at most 10,000; "
                                   "found 0"),
    ("lcm", {"settings": {"nodes": 50, "target_decay": 1.5}}, "--set settings.target_decay: settings: target_decay "
     "must be in [0, 1); found 1.5"),
    ("lcm", {"settings.huber_c": "inf"}, "--set settings.huber_c: settings.huber_c is 'inf'; it should be a "
     "finite number"),
    ("sid", {"settings": {"t_range": [0.1, float("nan")]}}, "settings.t_range.1 is nan; it should be a finite number"),
    ("sid", {"settings": {"alpha": -1.0}}, "settings: alpha must not be negative; found -1.0"),
    ("sid", {"settings": {"critic_guidance": float("inf")}}, "settings.critic_guidance is inf; it should be a "
     "finite number"),
    ("sid", {"settings": {"gan_weight": -0.01}}, "settings: gan_weight must be at least 0, which leaves the "
     "discriminator out; found -0.01"),
    ("sid", {"settings": {"start_time": 625}}, "settings: start_time must be a time from 0.001, the least that "
     "a network is told, to 1; found 625"),
])
def test_bad_settings_are_refused_at_their_place(method, changes, message):
    with pytest.raises(RequestError) as caught:
        Recipe.load(f"shapes/{method}", changes).method_settings()
    assert message in str(caught.value)


def test_an_entry_that_was_never_written_is_placed_at_what_was_written_of_it():
    source = Source.of_mapping({"train": {}}).overridden({"settings.nodes": 0}, {})
    assert source.where(("settings",)) == source.where(("settings", "nodes")) == "--set settings.nodes"
    assert source.where(("train",)) == "recipe"


def test_critic_and_discriminator_have_rates_of_their_own(write):
    path = write("method: lcm", "method: dmd2\ncritic: {lora: {rank: 4}, lr: 5e-4}\ndiscriminator: {features: "
                 "[mid_block], lr: 2e-4}")
    path.write_text(path.read_text().replace("settings: {nodes: 50}\n", ""))
    recipe = Recipe.load(path)
    assert (learning_rates(recipe) == {"critic": 5e-4, "discriminator": 2e-4} and recipe.discriminator.features
            == ["mid_block"])
    again = Recipe.load(recipe.resolved())
    assert again.resolved() == recipe.resolved() and learning_rates(again) == learning_rates(recipe)
    # the critic's
    assert learning_rates(Recipe.load(path, {"discriminator": None})) == {"critic": 5e-4, "discriminator": 5e-4}
    assert learning_rates(Recipe.load(path, {"discriminator": None, "settings": {"gan_weight": 0}})) == {"critic": 5e-4}
    assert learning_rates(Recipe.load(path, {"critic": "full", "discriminator": None})) == {}
    assert Recipe.load(path, {"critic": "full"}).resolved()["critic"] == "full"
    full = Recipe.load(path, {"critic": {"lora": None}})
    assert full.critic.lora is None and learning_rates(Recipe.load(full.resolved()))["critic"] == 5e-4
    for old, new, message in (("features: [mid_block]", "features: []", "mine.yaml:3: discriminator.features is "
                               "[]; it should not be empty"),
                           ("lr: 2e-4", "lr: 0", "discriminator.lr is 0; it should be above 0"),
                           ("lr: 5e-4", "lrr: 5e-4", "critic.lrr is no entry of critic; did you mean lr?")):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        assert message in refusal(path)
        path.write_text(text)


@pytest.mark.parametrize(("changes", "message"), [
    ({"settings.gan_weight": 0}, "discriminator is given, but with these settings dmd2 trains no discriminator; "
     "it trains student, critic"),
    ({"method": "swiftbrush"}, "discriminator is given, but swiftbrush trains no discriminator; it trains "
     "student, critic"),
    ({"method": "lcm"}, "discriminator is given, but lcm trains no discriminator; it trains student"),
])
def test_a_discriminator_that_no_update_trains_is_refused(tiny_teacher, changes, message):
    made = {"method": "dmd2", "teacher": str(tiny_teacher), "discriminator": {"lr": 1e-4},
            "data": {"images": "shapes", "batch": 2},
            "train": {"updates": 1}}
    recipe = Recipe.load(made, changes)
    needs = load_method(recipe.method).needs(recipe.method_settings(), full=False)
    with pytest.raises(RequestError, match=message):
        configured(recipe, needs)


def test_every_mistake_is_told_at_once(write):
    path = write("steps: 4", "steps: 0")
    path.write_text(path.read_text().replace("updates: 10", "updates: none"))
    assert len(refusal(path).splitlines()) == 2


def test_a_missing_teacher_is_told_before_anything_is_loaded(write, tiny_teacher):
    assert "there is no pipeline at" in refusal(write(str(tiny_teacher), str(tiny_teacher / "nowhere")))
    assert "mine.yaml:2:" in refusal(write(str(tiny_teacher), "./nowhere"))


def test_overrides_win_and_are_named_when_they_are_wrong(write):
    recipe = Recipe.load(write(), parse_set(["train.lr=1e-2", "student=full", "evaluate.nfe=[1, 2]"]))
    assert recipe.train.lr == 1e-2 and recipe.student.lora is None and recipe.evaluate.nfe == [1, 2]
    assert Recipe.load(write(), {"train": {"lr": 1e-2}}).train.updates == 10
    assert refusal(write(), **{"train.updtes": 3}).startswith("--set train.updtes:")
    with pytest.raises(RequestError, match="name and a value"):
        parse_set(["train.lr"])


def test_a_recipe_can_be_asked_for_again(write):
    """Its file and what was set, as words of a command."""
    recipe = Recipe.load(write(), parse_set(["train.lr=1e-2", "student=full", "evaluate.prompts=[it's red, 'a, b']"]))
    path, *rest = shlex.split(recipe.arguments)
    assert rest[::2] == ["--set"] * 3 and Recipe.load(path, parse_set(rest[1::2])).dump() == recipe.dump()
    assert Recipe.load(write()).arguments == str(write())


def test_a_dumped_recipe_is_the_same_recipe(write, tmp_path):
    recipe = Recipe.load(write(), {"student": "full"})
    (tmp_path / "again.yaml").write_text(recipe.dump())
    again = Recipe.load(tmp_path / "again.yaml")
    assert again.dump() == recipe.dump() and "skip: 1" in recipe.dump()


def test_a_mapping_is_a_recipe_too(tiny_teacher):
    mapping = {"method": "lcm", "teacher": str(tiny_teacher), "data": {"images": "shapes", "batch": 2},
               "train": {"updates": 1}}
    assert Recipe.load(mapping).steps == 4
    with pytest.raises(RequestError, match="did you mean batch"):
        Recipe.load({**mapping, "data": {"images": "shapes", "btch": 2}})


def test_built_in_recipes_are_found_by_name_and_valid():
    assert find("shapes/lcm-demo") == builtin()["shapes/lcm-demo"]
    with pytest.raises(RequestError, match="did you mean shapes/lcm"):
        find("shape/lcm")
    for path in builtin().values():
        Recipe.load(path, {"teacher": "owner/name"}).method_settings()


def test_a_refusal_costs_no_torch(write):
    code = ("import sys\nfrom stepdistill.recipe import Recipe\n"
            "try: Recipe.load(sys.argv[1])\nexcept ValueError as error: print('torch' in sys.modules, error)")
    done = subprocess.run([sys.executable, "-c", code, write("steps: 4", "steps: 0")], capture_output=True, text=True,
                          cwd=Path(__file__).parents[2])
    assert done.stdout.startswith("False") and "at least 1" in done.stdout, done.stderr


@pytest.mark.parametrize(("method", "discriminator", "message"), [
    ("add", {"network": "./nowhere"}, "--set discriminator.network: discriminator.network cannot be used: there "
     "is no vision network ./nowhere"),
    ("add", {"network": "assets/shapes-clip", "features": ["layers.99"]},
     "--set discriminator.features: discriminator.features cannot be read: a discriminator cannot read layers.99 "
     "of this network"),
    ("dmd2", {"features": ["mid_blok"]},
     "--set discriminator.features: discriminator.features cannot be read: a discriminator cannot read mid_blok "
     "of this network"),
])
@pytest.mark.parametrize("command", [plan, lambda recipe: setup(recipe, torch.device("cpu"))])
def test_what_a_discriminator_cannot_read_is_refused_at_its_place(tiny_teacher, command, method,
                                                                  discriminator, message):
    made = {"method": method, "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "steps": 1,
            "data": {"images": "shapes", "batch": 2}, "train": {"updates": 1}}
    with pytest.raises(RequestError) as caught:
        command(Recipe.load(made, {"discriminator": discriminator}))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("made", [lambda folder: None,
                                  lambda folder: (folder / "model_index.json").write_text('{"_class_name": "Other"}')])
def test_a_teacher_that_cannot_be_planned_on_is_refused_at_its_line(write, tiny_teacher, tmp_path, made):
    (tmp_path / "empty").mkdir()
    made(tmp_path / "empty")
    with pytest.raises(RequestError, match=r"mine.yaml:2: teacher cannot be loaded: .*empty is "):
        plan(Recipe.load(write(str(tiny_teacher), str(tmp_path / "empty"))))


MERGED = """\
method: lcm
teacher: assets/toy
student: full
data: {images: assets/toy, batch: 8}
train: &train
  updates: 4
  lr: 0.5
stages:
  - &first
    steps: 8
    train: {lr: 0.1}
  - <<: *first
    steps: 4
  - {<<: [*first], teacher: previous, train: {<<: *train, warmup: 1}}
"""


def test_merge_keys_are_served(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(MERGED)
    stages = Recipe.load(path).stages
    assert [(stage.steps, stage.train.lr, stage.train.updates, stage.train.warmup, stage.taught_by_previous)
            for stage in stages] == [
        (8, 0.1, 4, 0, False), (4, 0.1, 4, 0, False), (8, 0.5, 4, 1, True)]


@pytest.mark.parametrize(("old", "new", "line"), [("lr: 0.1", "lr: fast", 11), ("steps: 4", "steps: four", 13),
                                                  ("steps: 8", "stpes: 8", 10)])
def test_an_error_in_a_merged_entry_is_placed_where_it_was_written(tmp_path, old, new, line):
    path = tmp_path / "merged.yaml"
    path.write_text(MERGED.replace(old, new))
    assert f"{path}:{line}: " in refusal(path)


@pytest.mark.parametrize(("text", "message"), [
    (f"method: lcm\nteacher: assets/toy\ntrain: {{updates: {'9' * 30}}}",
     r"mine.yaml:3: train.updates is 99999999999999999999..., a number of 30 digits; it should be below"),
    (f"method: lcm\ntrain: {{updates: {'9' * 5000}}}", "mine.yaml: no valid YAML"), ("method: &m [*m]", "mine.yaml"),
    ("[" * 50_000, "mine.yaml: no valid YAML: it is nested too deeply")])
def test_what_cannot_be_read_is_one_message(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        Recipe.load(path)
