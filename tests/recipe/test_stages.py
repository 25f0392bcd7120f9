"""Recipes in stages: what each one is, what it hands to the next, and how a run of them is resumed and leaves."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepdistill import api
from stepdistill.data.stream import Stream
from stepdistill.diffusion.draws import Step
from stepdistill.diffusion.guidance import guided
from stepdistill.errors import RequestError
from stepdistill.export import read_settings
from stepdistill.recipe import Recipe
from stepdistill.recipe.yaml import parse_set
from stepdistill.run import folder as runs
from stepdistill.run.checks import check
from stepdistill.run.data import dataset
from stepdistill.run.plan import plan
from stepdistill.run.setup import open_run, previous_student, setup
from stepdistill.training import Stopped, checkpoints

CPU = torch.device("cpu")
GOOD = """\
method: lcm
teacher: {teacher}
student: {{lora: {{rank: 2}}}}
guidance: 2.0
steps: 2
settings: {{nodes: 10}}
data: {{images: shapes, count: 16, cache: true, batch: 4}}
train: {{updates: 2, lr: 1.0e-2, warmup: 2, ema: 0.5, checkpoint_every: 1, log_every: 1}}
evaluate: {{prompts: [a red ring]}}
stages:
  - {{steps: 4, train: {{updates: 3}}}}
  - steps: [2, 1]
    teacher: previous
    settings: {{skip: 2}}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def write(tmp_path: Path, tiny_teacher: Path):
    def write(old: str = "", new: str = "") -> Path:
        text = GOOD.format(teacher=tiny_teacher)
        assert old in text
        (tmp_path / "mine.yaml").write_text(text.replace(old, new))
        return tmp_path / "mine.yaml"
    return write


# -- what the stages of a recipe are -----------------------------------------------------------------------------------

def test_a_stage_is_the_recipe_with_its_own_entries(write):
    first, second, last = Recipe.load(write()).stages
    assert [(stage.steps, stage.train.updates) for stage in (first, second, last)] == [(4, 3), (2, 2), (1, 2)]
    assert (first.settings == {"nodes": 10} and last.settings == {"nodes": 10, "skip": 2}
            and first.train.lr == last.train.lr == 1e-2)
    assert first.previous is None and second.previous is first and last.previous is second
    assert [stage.taught_by_previous for stage in (first, second, last)] == [False, True, True]
    assert last.name == "mine" and last.arguments == str(write())


def test_a_recipe_of_one_stage_is_one_without(write):
    recipe = Recipe.load(write(), {"stages": [{}]})
    assert recipe.stages == (recipe,) and recipe.previous is None and "stages" not in recipe.resolved()


def test_another_method_has_settings_of_its_own_and_other_data_take_the_place_of_the_recipe_s(write):
    path = write("steps: 4, train", "method: dmd2, data: {prompts: [a], count: null, cache: false}, settings: "
                 "{gan_weight: 0.0}, train")
    first, *_, last = Recipe.load(path).stages
    assert (first.settings == {"gan_weight": 0.0} and first.data.kind == "prompts" and last.data.kind == "images"
            and last.data.batch == 4)


def test_what_is_set_holds_in_every_stage(write):
    stages = Recipe.load(write(), parse_set(["train.updates=7", "settings.nodes=20"])).stages
    assert ([stage.train.updates for stage in stages] == [7, 7, 7] and [stage.settings["nodes"] for stage in stages]
            == [20, 20, 20])
    assert stages[-1].settings["skip"] == 2
    assert Recipe.load(write(), {"stages": [{"steps": 8}]}).steps == 8


def test_a_dumped_recipe_has_the_same_stages(write, tmp_path):
    path = write("steps: 4, train", "method: dmd2, critic: full, student: full, data: {prompts: [a], count: null, "
                 "cache: false}, settings: {gan_weight: 0.0}, train")
    recipe = Recipe.load(path)
    (tmp_path / "again.yaml").write_text(recipe.dump())
    again = Recipe.load(tmp_path / "again.yaml")
    assert again.dump() == recipe.dump() and [s.resolved() for s in again.stages] == [s.resolved()
                                                                                      for s in recipe.stages]
    assert len(recipe.stages[1].resolved()["stages"]) == 2 and "stages" not in recipe.stages[0].resolved()
    assert [stage.teacher for stage in Recipe.load(recipe.resolved()).stages] == [recipe.teacher] * 3


@pytest.mark.parametrize(("old", "new", "line", "message"), [
    ("steps: 4, train", "stpes: 4, train", 11, "stpes is no entry of a recipe; did you mean steps?"),
    ("{updates: 3}", "{updates: 0}", 11, "train.updates is 0; it should be at least 1"),
    ("skip: 2", "skpi: 2", 14, "settings.skpi is no setting of lcm; did you mean skip?"),
    ("[2, 1]", "[2, one]", 12, "steps is 'one'; it should be a whole number"),
    ("teacher: previous", "teacher: last", 13, "teacher of a stage is 'last'; it should be base, the recipe's "
     "pipeline, or previous"),
    ("{steps: 4, ", "{teacher: previous, ", 11, "no stage is before it"),
    ("{steps: 4, ", "{revision: main, ", 11, "revision is no entry of a stage"),
    ("{steps: 4, ", "{stages: [], ", 11, "stages is no entry of a stage"),
    ("steps: 2\nsettings", "stages_: []\nsettings", 5, "did you mean stages?"),
    ("    settings: {skip: 2}", "    student: {lora: {rank: 4}}", 14, "a LoRA stays what it is, or becomes full"),
    ("{steps: 4, ", "{student: full, ", 3, "student is {lora: {rank: 2}}, but it begins as the student of the stage "
     "before, which is full"),
    ("{steps: 4, ", "{settings: {guidance_embedding: true}, ", 1, "let both have one by their settings "
     "(guidance_embedding: true), or neither"),
    ("    settings: {skip: 2}", "    settings: {guidance_embedding: true}", 1,
     "has a guidance embedding, and that of the stage before has no"),
    ("    settings: {skip: 2}", "    guidance: 1.0", 14, "but the teacher is the student of the stage before, which "
     "has learned 2.0"),
])
def test_a_bad_stage_is_refused_with_its_line(write, old, new, line, message):
    with pytest.raises(RequestError) as caught:
        for stage in Recipe.load(write(old, new)).stages:
            check(stage)
    assert f"mine.yaml:{line}:" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(("stages", "message"), [("two", "list of tables"), ([], "list of tables"),
                                                 ([1], "list of tables")])
def test_stages_are_a_list_of_tables(write, stages, message):
    with pytest.raises(RequestError, match=f"--set stages: stages is .*{message}"):
        Recipe.load(write(), {"stages": stages})


def test_a_critic_begins_as_the_teacher(write):
    path = write("    settings: {skip: 2}", "    method: dmd2\n    critic: {lora: {rank: 3}}")
    with pytest.raises(RequestError, match="mine.yaml:15: critic is {lora: {rank: 3}}, but it begins as the student "
                       "of the stage before"):
        check(Recipe.load(path).stages[1])
    assert check(Recipe.load(path, {"critic": "full"}).stages[1])
    path = write("guidance: 2.0", "guidance: [1.0, 3.0]")
    path.write_text(path.read_text().replace("settings: {skip: 2}", "method: dmd2").replace("nodes: 10",
                                                                                            "guidance_embedding: true"))
    with pytest.raises(RequestError, match="is dmd2, whose student has no guidance embedding"):
        check(Recipe.load(path).stages[1])


@pytest.mark.long
def test_a_plan_counts_stages(write):
    found = plan(Recipe.load(write()))
    first, second, last = found["stages"]
    # guidance lies in the student before
    assert [stage["passes"]["forward"] for stage in (first, second, last)] == [4, 3, 3]
    assert found["passes"] == {"forward": round((3 * 4 + 2 * 3 + 2 * 3) / 7, 3), "backward": 1, "batch": 4,
                               "updates": 7}
    assert set(second["roles"]) - set(first["roles"]) == {"base"} and second["roles"]["teacher"]["trained"] == 0
    assert second["roles"]["teacher"]["parameters"] == second["roles"]["student"]["parameters"]
    assert (found["disk"] == sum(stage["disk"] for stage in found["stages"])
            and found["peak"] == max(s["peak"] for s in found["stages"]))
    live = plan(Recipe.load(write(), {"data.cache": False}))["stages"]
    cached = [one["disk"] - other["disk"] for one, other in zip(found["stages"], live, strict=True)]
    assert cached[0] > 0 and cached[1:] == [0, 0]


# -- a run of stages ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def recipe(tiny_teacher):
    return {"method": "lcm", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
            "guidance": 2.0, "steps": 2,
            "settings": {"nodes": 10}, "data": {"images": "shapes", "count": 16, "cache": True, "batch": 4},
            "train": {"updates": 2, "lr": 1e-2, "warmup": 2, "ema": 0.5, "checkpoint_every": 1, "log_every": 1},
            "evaluate": {"prompts": ["a red ring"]}, "stages": [{"train": {"updates": 3}}, {"teacher": "previous"}]}


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPDISTILL_CACHE", str(folder / "cache"))
        return api.train(recipe, out=folder / "run")


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    return lambda work, w=None: (torch.randn(3, 4, 8, 8, generator=g.manual_seed(0)),
                                 torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64),
                                 work.teacher.encode(["a red ring", "a", ""]).replace(w=w))


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_each_stage_is_a_run_folder_and_the_last_lies_in_the_run_s_own(run):
    assert ({"recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "samples", "stages"}
            <= {p.name for p in run.iterdir()})
    first, last = run / "stages/1", run
    assert runs.is_run(first) and "stages" not in Recipe.load(first / "recipe.yaml").resolved()
    assert len(Recipe.load(run / "recipe.yaml").stages) == 2
    metrics = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
               for folder in (first, last)]
    assert [[row["step"] for row in rows] for rows in metrics] == [[1, 2, 3], [1, 2]]
    assert [row["lr"] for row in metrics[1]] == [0.005, 0.01], "the schedule begins anew"
    assert checkpoints.roles_in(checkpoints.latest(last)) == ["ema", "student"], (
        "the frozen teacher is read from the stage before")
    optimizer = load_file(checkpoints.latest(last) / "optimizer-student.safetensors")
    assert {value.item() for name, value in optimizer.items() if name.startswith("step.")} == {2.0}, (
        "the optimizer begins anew")


def test_a_stage_begins_with_the_best_student_before_which_is_its_teacher_too(recipe, run, inputs):
    whole = Recipe.load(recipe)
    work = setup(whole, CPU, previous=previous_student(whole, run / "stages/1"))
    best = checkpoints.load_role(checkpoints.latest(run / "stages/1"), "ema")
    assert not same(best, checkpoints.load_role(checkpoints.latest(run / "stages/1"), "student"))
    for role in ("teacher", "student", "ema"):
        assert same(work.roles.state_dict(role), best)
    before = open_run(run / "stages/1")
    with torch.no_grad():
        known = before.roles["ema"](*inputs(before)).raw
        for role in ("teacher", "student"):
            assert torch.equal(work.roles[role](*inputs(work)).raw, known)
        assert torch.equal(guided(work.roles["teacher"], 2.0)(*inputs(work)).raw, known), "its guidance lies within"
        assert not torch.equal(work.roles.base(*inputs(work)).raw, known)
        assert torch.equal(work.roles.base(*inputs(work)).raw, before.roles["teacher"](*inputs(before)).raw)
    batch = Stream(dataset(work), 4, 0).batch(0, "student")
    sum(work.method.updates()[0].loss(batch, Step(0, 0, 0.0, "student", 0, batch.ids)).values()).backward()
    assert (all(p.grad is None for p in work.roles.parameters("teacher"))
            and any(p.grad.any() for p in work.roles.parameters("student")))


def test_one_lora_on_the_base_leaves_at_the_end_without_the_stages_before(run, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("stages"))
    folder = api.export(alone, out=tmp_path / "lora")
    state = checkpoints.load_role(checkpoints.latest(run), "ema")
    weights = load_file(folder / read_settings(folder)["weights"])
    assert len(weights) == len(state) and {v.shape for v in weights.values()} == {v.shape for v in state.values()}
    pixels = [torch.tensor(list(api.sample(target, "a red ring")[0].getdata())) for target in (alone, folder)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1


@pytest.mark.parametrize("stopped_in", ["stages/1", "."])
def test_resuming_goes_on_in_the_stage_where_it_stopped_bit_for_bit(recipe, run, tmp_path, stopped_in):
    part = tmp_path / "part"
    if stopped_in == "stages/1":
        (part / "stages").mkdir(parents=True)
        for name in ("recipe.yaml", "environment.json"):
            shutil.copy(run / name, part / name)
        shutil.copytree(run / "stages/1", part / "stages/1")
        shutil.rmtree(part / "stages/1/checkpoints/step-000003")
    else:
        shutil.copytree(run, part)
        shutil.rmtree(part / "checkpoints/step-000002")
    begun = (part / "stages/1/checkpoints/step-000002").stat().st_mtime_ns
    api.train(recipe, out=part, resume=True)
    for folder in ("stages/1", "."):
        found, known = (checkpoints.load(checkpoints.latest(whole / folder)) for whole in (part, run))
        assert found.keys() == known.keys() and all(same(found[name], known[name]) for name in known)
        assert (part / folder / "metrics.jsonl").read_bytes() == (run / folder / "metrics.jsonl").read_bytes()
    assert (part / "stages/1/checkpoints/step-000002").stat().st_mtime_ns == begun


def test_only_the_whole_run_is_resumed_with_its_own_recipe(recipe, run):
    with pytest.raises(RequestError, match="is a stage of .*run: resume that run"):
        api.train(run / "stages/1/recipe.yaml", out=run / "stages/1", resume=True)
    with pytest.raises(RequestError, match="stages.1.train.updates was 3, now 4"):
        api.train(recipe | {"stages": [{"train": {"updates": 4}}, {"teacher": "previous"}]}, out=run, resume=True)


def test_later_stages_are_checked_before_the_first_is_trained(recipe, tmp_path):
    for last, message in (({"steps": 11}, "steps is 11, which cannot be sampled"),
                          ({"data": {"prompts": ["a"]}}, "lcm trains on images")):
        with pytest.raises(RequestError, match=message):
            api.train(recipe | {"stages": [{}, last]}, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_lora_becomes_full_between_stages_and_is_told_its_scale(recipe, tmp_path, inputs):
    """The full student of stage 2 is what the adapter of stage 1 was; stage 3 goes on from all its weights."""
    full = {"student": "full", "teacher": "previous", "train": {"updates": 1, "lr": 1e-3}}
    made = Recipe.load(recipe | {"settings": {"nodes": 10, "guidance_embedding": True}, "guidance": [1.0, 3.0],
                                 "stages": [{}, full, full]})
    run = api.train(made, out=tmp_path / "run")
    works = [open_run(folder) for folder in runs.stage_folders(made, run)]
    places = zip(made.stages[1:], runs.stage_folders(made, run), strict=False)
    starts = [setup(stage, CPU, previous=previous_student(stage, folder)) for stage, folder in places]
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    with torch.no_grad():
        for before, start in zip(works, starts, strict=False):
            known = before.roles["ema"](*inputs(before, w)).raw
            for role in ("teacher", "student"):
                torch.testing.assert_close(start.roles[role](*inputs(start, w)).raw, known, rtol=1e-4, atol=1e-5)
            with pytest.raises(ValueError, match="reads w, but the condition has no w"):
                start.roles["teacher"](*inputs(start))
    assert (starts[0].roles.is_lora("teacher") and not starts[0].roles.is_lora("student")
            and not starts[1].roles.is_lora("teacher"))
    folder = api.export(run, to="pipeline", guidance=2.0, out=tmp_path / "pipeline")
    assert read_settings(folder)["call"]["guidance_scale"] == 2.0


def test_what_the_student_before_makes_is_kept_apart_from_what_the_base_makes(recipe, run):
    """Samples of a stage are made by its teacher."""
    data = {"samples": {"prompts": ["a red ring"], "solver": "ddim", "steps": 2}, "images": None,
            "cache": False, "count": 4}
    stage = Recipe.load(recipe | {"data": recipe["data"] | data})
    latents = []
    for one, before in ((stage.previous, None), (stage, previous_student(stage, run / "stages/1"))):
        work = setup(one, CPU, previous=before)
        latents.append(dataset(work)[torch.arange(4)][0])
    assert (latents[0] - latents[1]).abs().max() > 1e-3
    with pytest.raises(RequestError, match="made by the student of the stage before"):
        pairs = {"pairs": data["samples"], "samples": None}
        api.pairs(recipe | {"stages": [{}, {"teacher": "previous", "data": pairs | {"cache": False}}]})


def test_an_interrupted_stage_says_what_is_kept(recipe, tmp_path):
    with pytest.raises(Stopped, match="stages/1/checkpoints|No checkpoint"):
        api.train(recipe | {"train": recipe["train"] | {"lr": 1e30, "clip": None}}, out=tmp_path / "run")
    assert runs.is_run(tmp_path / "run") and runs.is_run(tmp_path / "run/stages/1")
