"""SnapFusion beyond its identities: who is guided when, how its student is called, and which stages teach which."""
import pytest
import torch

from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Inference, Trained
from stepdistill.methods.trajectory.snapfusion import Settings, SnapFusion
from stepdistill.models.schedulers import stock_call
from stepdistill.models.stock import Guidance
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.proofs.snapfusion import made
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check
from stepdistill.run.preview import student_samples
from stepdistill.run.setup import setup

from .players import spelled


def halved(problem: Problem) -> FunctionRole:
    return FunctionRole(problem.schedule, lambda x, t, cond: x / 2 + cond.text, "x0")


@pytest.mark.parametrize("noise", NAMES)
def test_a_share_of_the_steps_is_guided_on_both_sides(noise):
    problem, guided = Problem(0, noise), 0
    for index in range(200):
        teacher, student = halved(problem), halved(problem)
        made(problem, teacher, student, guided_share=0.3).loss(problem.batch(4), problem.step(4, index=index))
        sizes = {len(x) for role in (teacher, student) for x, _, _ in role.calls}
        assert sizes in ({4}, {8}) and [len(teacher.calls), len(student.calls)] == [2, 1]
        guided += sizes == {8}
    assert abs(guided / 200 - 0.3) < 0.1


def test_the_data_s_own_x0_is_asked_of_the_plain_answer():
    """A student that says x / 2 + text, guided at 3: its answer to the prompt alone is held against the data."""
    problem = Problem(1, "flow")
    batch, step = problem.batch(500), problem.step(500)
    losses = made(problem, problem.teacher, halved(problem), w=3.0, denoising_weight=0.7).loss(batch, step)
    t = 1 - step.integers("step", 4).double() / 4
    x_t = (1 - t)[:, None] * batch.x0 + t[:, None] * step.normal("noise", batch.shape).double()
    weight = (((1 - t) / t) ** 2).clamp(min=1)
    known = 0.7 * (weight * (x_t / 2 + batch.cond.text - batch.x0).square().mean(1)).mean()
    assert losses["denoising"].item() == pytest.approx(known.item(), rel=1e-5)


def test_it_is_called_with_guidance_at_the_middle_of_the_scales():
    call = spelled(SnapFusion, Settings(), 8, "vp", (2.0, 14.0)).call
    assert call["guidance_scale"] == 8.0 and call["num_inference_steps"] == 8
    assert spelled(SnapFusion, Settings(), 8, "vp", 1.0).call["guidance_scale"] == 1.0
    schedule, spoken = Problem(0, "flow").schedule, Guidance("true_cfg_scale", beside={"negative_prompt": " "})
    assert stock_call(Inference(2, cfg=3.0), schedule, spoken).call == {
        "num_inference_steps": 2, "true_cfg_scale": 3.0, "negative_prompt": " ", "sigmas": [1.0, 0.5]}
    for silent in (Guidance(None), Guidance(embedded="guidance_scale", within=True)):
        with pytest.raises(ValueError, match="no call of this teacher's pipeline guides so"):
            stock_call(Inference(2, cfg=3.0), schedule, silent)


def table(teacher, **more):
    return {"method": "snapfusion", "teacher": str(teacher), "student": {"lora": {"rank": 2}}, "steps": 2,
            "guidance": 3.0, "data": {"images": "shapes", "batch": 2}, "train": {"updates": 1, "ema": None}} | more


def test_samples_of_a_run_are_guided(tiny_teacher):
    run = setup(Recipe.load(table(tiny_teacher)), torch.device("cpu"))
    noise = lambda name: torch.randn(2, *run.teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    cond = run.teacher.encode(["a red ring"] * 2)
    found = student_samples(run, noise, cond)
    student = run.roles["student"]
    x = noise("start")
    for e in run.method.sampler.evaluations:                        # DDIM by hand, of null + 3 (given - null)
        t, r = (torch.full((2,), at, dtype=torch.float64) for at in (e.level, e.landing))
        given, null = student(x, t, cond.replace(null=None)), student(x, t, cond.null)
        a, s, a_r, s_r = (f(u).float()[:, None, None, None] for u in (t, r)
                          for f in (run.teacher.schedule.alpha, run.teacher.schedule.sigma))
        x0 = null.x0 + 3 * (given.x0 - null.x0)
        x = a_r * x0 + s_r / s * (x - a * x0)
    torch.testing.assert_close(found, x, rtol=0, atol=2e-4)


def test_stages_are_of_students_that_are_guided_alike(tiny_teacher):
    staged = lambda first, then: Recipe.load(table(tiny_teacher, stages=[
        {"method": first, "steps": 4}, {"method": then, "steps": 2, "teacher": "previous"}])).stages
    assert [check(stage).needs["teacher"] for stage in staged("snapfusion", "snapfusion")] == [Frozen(within=False)] * 2
    for first, then, says in (("progressive", "snapfusion", "is guided by its pipeline.*has its guidance within"),
                              ("snapfusion", "progressive", "has its guidance within.*is guided by its pipeline")):
        with pytest.raises(RequestError, match=f"method is {then}, whose student {says}"):
            [check(stage) for stage in staged(first, then)]


def test_a_teacher_of_the_stage_before_is_guided_again(tiny_teacher):
    """The student of the stage before is the second's teacher, and is asked about no prompt too."""
    from stepdistill.run.setup import Previous, student_weights
    first, second = Recipe.load(table(tiny_teacher, stages=[{"steps": 4}, {"steps": 2, "teacher": "previous"}])).stages
    before = setup(first, torch.device("cpu"))
    previous = Previous(student_weights(first, before.roles.state_dict("student")), "")
    run = setup(second, torch.device("cpu"), previous=previous)
    from stepdistill.diffusion.guidance import Guided, guided
    assert isinstance(guided(run.roles["teacher"], 3.0), Guided)


def test_roles_and_steps():
    assert SnapFusion.needs(Settings(), False) == {"teacher": Frozen(within=False), "student": Trained("teacher")}
    assert SnapFusion.succession(8, 16) is None and "the stage before has 16" in SnapFusion.succession(8, 12)
    with pytest.raises(ValueError, match="takes two steps for each, and has 1000 times; found 501"):
        spelled(SnapFusion, Settings(), 501, "vp")


@pytest.mark.parametrize("wrong", [{"guided_share": -0.1}, {"guided_share": 1.1}, {"denoising_weight": -1.0},
                                   {"weight": "snr"}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
