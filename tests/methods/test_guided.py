import pytest
import torch

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.export import read_settings
from stepdistill.methods.trajectory.guided import GuidedDistillation, Settings
from stepdistill.proofs.guided import made
from stepdistill.proofs.problem import FunctionRole, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check
from stepdistill.run.setup import previous_student, setup

from .players import spelled

STAGES = [{"method": "guided", "settings": {}, "steps": 8}, {"steps": [4, 2], "teacher": "previous"}]


def recipe(teacher) -> dict:
    return {"method": "progressive", "teacher": str(teacher), "student": {"lora": {"rank": 2}}, "guidance": [1.0, 3.0],
            "settings": {"guidance_embedding": True},
            "data": {"images": "shapes", "count": 8, "cache": True, "batch": 4},
            "train": {"updates": 1, "lr": 1e-2, "ema": 0.5},
            "evaluate": {"prompts": ["a red ring"]}, "stages": STAGES}


def test_each_sample_has_a_scale_of_its_own_and_no_prompt_is_dropped():
    problem = Problem(0, "vp")
    student = FunctionRole(problem.schedule, lambda x, t, cond: x, problem.kind)
    made(problem, student, (1.0, 4.0)).loss(batch := problem.batch(200), problem.step(200))
    ((_, t, cond),) = student.calls
    assert len(cond.w.unique()) == 200 and 1 <= cond.w.min() < 1.1 and 3.9 < cond.w.max() <= 4
    assert torch.equal(cond.text, batch.cond.text) and t.min() > 0 and t.max() <= 1


def test_its_student_is_told_unless_said_otherwise():
    assert GuidedDistillation.needs(Settings(), False)["student"].reads == ("w",)
    assert GuidedDistillation.needs(Settings(guidance_embedding=False), False)["student"].reads == ()
    assert spelled(GuidedDistillation, Settings(), 16, "vp", (2.0, 5.0)).call["guidance_scale"] == 3.5
    assert spelled(GuidedDistillation, Settings(guidance_embedding=False), 8, "flow", 3.0).call["guidance_scale"] == 1.0
    with pytest.raises(ValueError, match="weight must be 'truncated' or 'v'; found 1"):
        Settings(weight=1)


def test_what_comes_after_is_told_too(tiny_teacher):
    with pytest.raises(RequestError, match="has no guidance embedding, and that of the stage before has a guidance "
                       "embedding"):
        check(Recipe.load(recipe(tiny_teacher) | {"settings": {}}).stages[1])
    with pytest.raises(RequestError, match="guidance is 4.0, but the teacher is the student of the stage before, "
                       "which has learned"):
        check(Recipe.load(recipe(tiny_teacher) | {"stages": [STAGES[0], STAGES[1] | {"guidance": 4.0}]}).stages[1])
    assert check(Recipe.load(recipe(tiny_teacher) | {"stages": [STAGES[0], STAGES[1] | {"guidance": 2.0}]}).stages[1])


@pytest.mark.long
def test_both_stages_on_a_real_pipeline_leave_as_one_lora_at_a_scale(tiny_teacher, tmp_path, monkeypatch):
    """Every stage's teacher is told the scales that its student is told."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    run = api.train(recipe(tiny_teacher), out=tmp_path / "run")
    last = Recipe.load(run / "recipe.yaml")
    assert [(stage.method, stage.steps) for stage in last.stages] == [("guided", 8), ("progressive", 4),
                                                                      ("progressive", 2)]
    work = setup(last, torch.device("cpu"), previous=previous_student(last, run / "stages/2"))
    assert {name for name, numbers in work.roles.reads.items() if "w" in numbers} == {"teacher", "student", "ema"}
    assert work.roles.state_dict("teacher")["time_embedding.cond_proj.weight"].any(), (
        "the layer that reads the scale has learned")
    folder = api.export(run, guidance=1.5, out=tmp_path / "lora")
    settings = read_settings(folder)
    assert (settings["guidance"] == 1.5 and settings["call"] == {"num_inference_steps": 2, "guidance_scale": 1.0}
            and settings["scheduler"] == "DDIMScheduler")
