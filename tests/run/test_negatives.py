"""From a recipe with negatives to a student on which a negative prompt acts, and where there can be none."""
from __future__ import annotations

import json

import pytest
import torch
from tiny import save_tiny_sd3

import stepdistill
from stepdistill.data.stream import Stream
from stepdistill.diffusion.draws import Step
from stepdistill.errors import RequestError
from stepdistill.evaluation.plans import plans
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check
from stepdistill.run.data import dataset, negatives
from stepdistill.run.first_call import check_first_call
from stepdistill.run.negatives import kept_scale
from stepdistill.run.plan import plan
from stepdistill.run.setup import setup
from stepdistill.run.targets import open_target

NEGATIVES = ["navy", "a blue square"]
LORA = {"lora": {"rank": 2}}
CPU = torch.device("cpu")


def recipe(teacher, **changes) -> dict:
    return {"method": "lcm", "teacher": str(teacher), "student": LORA, "steps": 2, "guidance": 2.5,
            "settings": {"nodes": 10},
            "negatives": {"prompts": NEGATIVES}, "train": {"updates": 1}, "evaluate": {"prompts": ["a red ring"]},
            "data": {"images": "shapes", "count": 4, "batch": 4}, **changes}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3"), call={"max_sequence_length": 0})


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_untrained_student_at_the_teachers_scale_is_its_fixed_point(tiny_teacher, sd3, share):
    """`guided` matches the student's prediction to the guided teacher's at one state: with the same base, scale and
    negative both are one."""
    for teacher in (tiny_teacher, sd3):
        made = recipe(teacher, method="guided", settings={"guidance_embedding": False},
                      negatives={"prompts": NEGATIVES, "share": share})
        run = setup(Recipe.load(made), CPU)
        batch = Stream(dataset(run), 4, 0, run.teacher.latent_shape, negatives=negatives(run)).batch(0, "student")
        step = Step(0, 0, 0.0, "student", 0, batch.ids)
        loss = lambda cond: sum(run.method.loss(type(batch)(batch.ids, cond, batch.x0), step).values()).item()
        assert loss(batch.cond) < 1e-9
        own = batch.cond.negative.text
        assert (own != batch.cond.null.text).flatten(1).any(1).double().mean() > (0 if share == 0.5 else 0.99)
        # The student against the null while its teacher is guided away from the negative: that is another prediction.
        student = run.method.student
        run.method.student = lambda x, t, cond: student(x, t, cond.replace(negative=None))
        assert loss(batch.cond) > 1e-6


def test_a_student_leaves_with_its_guidance_and_two_evaluations_a_step(tiny_teacher, tmp_path):
    run = stepdistill.train(recipe(tiny_teacher), out=tmp_path / "run")
    written = Recipe.load(run / "recipe.yaml")
    assert list(written.negatives.prompts) == NEGATIVES and kept_scale(written) == 2.5
    out = stepdistill.export(run, out=tmp_path / "lora", dtype="float32")
    settings = json.loads((out / "stepdistill.json").read_text())
    assert (settings["call"]["guidance_scale"] == 2.5 and settings["negative"] == "navy"
            and settings["proof"]["difference"] < 1e-4)
    said = []
    for place in (run, out):
        rows = plans(open_target(place, "student").target, [1, 2, 4], (1.0,), (), said.append)
        assert [(row.nfe, row.steps, row.guidance) for row in rows] == [(2, 1, 2.5), (4, 2, 2.5)]
    assert said == ["student is guided, and a step takes 2 evaluations: it is not run at 1"] * 2
    pictures = [stepdistill.sample(out, "a red ring", negative=negative)[0].tobytes() for negative in (None, "navy")]
    assert pictures[0] != pictures[1]


def test_the_base_is_called_guided_as_the_student_will_be(tiny_teacher, sd3):
    for teacher in (tiny_teacher, sd3):
        run = setup(Recipe.load(recipe(teacher, negatives={"prompts": NEGATIVES, "scale": 4.0})), CPU)
        assert run.stock.call["guidance_scale"] == 4.0 and check_first_call(run) <= 1e-4


def test_a_plan_counts_both_passes(tiny_teacher):
    one, two = (plan(Recipe.load({**recipe(tiny_teacher), "negatives": n}))["passes"]
                for n in (None, {"prompts": NEGATIVES}))
    assert (one["forward"], one["backward"], two["forward"], two["backward"]) == (4, 1, 6, 2)


def test_the_teachers_own_negative_prompt_stays_where_none_is_drawn(tiny_teacher):
    run = setup(Recipe.load(recipe(tiny_teacher, negative_prompt="blurred")), CPU)
    assert run.stock.call["negative_prompt"] == "blurred" and check_first_call(run) <= 1e-4


PAIRS = {"pairs": {"prompts": ["a red ring"]}, "count": 2, "batch": 2}
PROMPTS = {"prompts": ["a red ring"], "batch": 2}


@pytest.mark.parametrize("changes, says", [
    ({"guidance": [2.0, 4.0]}, r"guidance is \[2.0, 4.0\], but a student that keeps its guidance"),
    ({"guidance": 1.0}, "guidance is 1, at which a teacher reads no negative prompt"),
    ({"negatives": {"prompts": NEGATIVES, "scale": 1.0}}, "negatives.scale"),
    ({"negatives": {"prompts": NEGATIVES, "share": 0.0}}, "negatives.share"),
    ({"negatives": {"prompts": "none"}}, "negatives.prompts is none: give texts in brackets"),
    ({"negatives": {"prompts": "missing.txt"}}, "negatives.prompts is missing.txt: .* that exists"),
    ({"settings": {"guidance_embedding": True}}, "the student reads its guidance scale, and stock pipelines switch "
     "guidance off"),
    ({"method": "dmd2", "settings": {}, "critic": LORA}, "the critic and the discriminator of dmd2 would be trained "
     "on samples"),
    ({"method": "swiftbrush", "settings": {}, "steps": 1, "data": PROMPTS, "critic": LORA},
     "the critic of swiftbrush would be trained on samples"),
    ({"method": "pcm", "settings": {}, "steps": 4}, "the discriminator of pcm would be trained"),
    ({"method": "ict", "settings": {}}, "guidance is 2.5, but ict asks no teacher that could be guided"),
    ({"method": "kd", "settings": {}, "steps": 1, "data": PAIRS}, "data.pairs are ways that the teacher took "
     "without them"),
    ({"stages": [{"steps": 4, "method": "progressive", "settings": {}},
                 {"steps": 2, "method": "progressive", "settings": {}, "teacher": "previous"}]},
     "the teacher of this stage is the student of the one before"),
    ({"stages": [{"steps": 4}, {"steps": 2, "negatives": None}]}, "negatives is no entry of a stage"),
    ({"negative": {"prompts": NEGATIVES}}, "negative.*negatives"),
])
def test_what_cannot_be_is_refused_before_anything_is_loaded(tiny_teacher, changes, says):
    with pytest.raises(RequestError, match=says):
        loaded = Recipe.load(recipe(tiny_teacher, **changes))
        for stage in loaded.stages:
            check(stage)


def test_a_teacher_that_reads_no_text_is_refused():
    toy = {**recipe("assets/toy"), "data": {"images": "assets/toy", "batch": 4}}
    with pytest.raises(RequestError, match="negatives are given, but a call of a Toy takes no negative_prompt"):
        check(Recipe.load({**toy, "evaluate": {}}))


def test_a_negative_prompt_without_guidance_is_refused(tiny_teacher, tmp_path):
    run = stepdistill.train({**recipe(tiny_teacher), "negatives": None}, out=tmp_path / "run")
    with pytest.raises(RequestError, match="--negative has no effect on target, which is called without guidance"):
        stepdistill.sample(run, "a red ring", negative="navy")
    teacher = [stepdistill.sample(tiny_teacher, "a red ring", steps=2, negative=n)[0].tobytes() for n in (None, "navy")]
    assert teacher[0] != teacher[1]
