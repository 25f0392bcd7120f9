import pytest
import torch

from stepdistill.diffusion.guidance import self_guided
from stepdistill.errors import RequestError
from stepdistill.methods.trajectory.progressive import Progressive, Settings
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.proofs.progressive import closed, made
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check

from .players import spelled


@pytest.mark.parametrize("noise", NAMES)
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_it_trains_at_the_times_of_its_own_sampler(noise, steps):
    problem = Problem(0, noise)
    method = made(problem, problem.teacher, student := closed(problem, steps, problem.w), steps)
    method.loss(problem.batch(500), problem.step(500))
    ((_, t, _),) = student.calls
    torch.testing.assert_close(t.unique().flip(0), method.sampler.times, rtol=0, atol=1e-6)
    assert t.dtype == torch.float64


@pytest.mark.parametrize("noise", NAMES)
def test_at_the_last_step_the_target_is_what_the_teacher_predicts_between(noise):
    """The published rule for i = 0."""
    problem = Problem(1, noise)
    method, cond = made(problem, problem.teacher, problem.teacher), problem.cond(8)
    t, m, r = (u.expand(8) for u in method.grid[-3:])
    x_t, asked = (problem.normal(8, problem.dim),
                  FunctionRole(problem.schedule, lambda x, t, c: problem.teacher(x, t, c).x0, problem.kind))
    method.teacher = self_guided(asked, guidance_embedding=False)
    target = method.target(x_t, t, m, r, cond, problem.w)
    x_m = asked.calls[1][0]
    torch.testing.assert_close(target, problem.teacher(x_m, m, cond).x0, rtol=0, atol=1e-12)
    assert r.eq(0).all() and torch.equal(asked.calls[1][1], m)


def test_only_the_first_teacher_is_guided_from_without():
    problem = Problem(2, "vp")
    for wrap, size in ((lambda role: role, 16), (lambda role: self_guided(role, guidance_embedding=False), 8)):
        teacher = FunctionRole(problem.schedule, lambda x, t, cond: problem.teacher(x, t, cond).x0, problem.kind)
        made(problem, wrap(teacher), problem.affine()).loss(problem.batch(8), problem.step(8))
        assert [len(x) for x, _, _ in teacher.calls] == [size, size]


def test_the_weight_of_v_is_one_more():
    problem, losses = Problem(3, "flow"), {}
    batch, step, off = problem.batch(64), problem.step(64), closed(problem, 4, 1.0)
    for weight in ("truncated", "v"):
        losses[weight] = made(problem, problem.teacher, off, weight=weight).loss(batch, step)["progressive"]
    assert losses["truncated"] < losses["v"] < 2 * losses["truncated"] + 1e-9


def test_the_step_counts_that_are_served():
    assert spelled(Progressive, Settings(), 4, "vp").scheduler == "DDIMScheduler"
    assert spelled(Progressive, Settings(), 16, "vp").scheduler == "EulerDiscreteScheduler"
    assert spelled(Progressive, Settings(), 501, "flow").call["num_inference_steps"] == 501
    assert spelled(Progressive, Settings(guidance_embedding=True), 4, "vp", (1.0, 4.0)).call["guidance_scale"] == 2.5
    with pytest.raises(ValueError, match="takes two steps for each, and has 1000 times; found 501"):
        spelled(Progressive, Settings(), 501, "vp")
    with pytest.raises(ValueError, match="weight must be 'truncated' or 'v'; found 'snr'"):
        Settings(weight="snr")


def test_a_halving_is_of_powers_of_two_before_anything_is_loaded(tmp_path):
    (tmp_path / "teacher").mkdir()                   # nothing to load in it
    (tmp_path / "teacher" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    recipe = {"method": "progressive", "teacher": str(tmp_path / "teacher"), "data": {"images": "shapes", "batch": 2},
              "train": {"updates": 1}}
    stages = lambda first, *rest: Recipe.load(recipe | {"stages": [{"steps": first}, {"steps": list(rest),
                                                                                      "teacher": "previous"}]}).stages
    assert all(check(stage) for stage in stages(32, 16, 8, 4, 2, 1)) and all(check(stage) for stage in stages(12, 6, 3))
    for wrong, message in (((12, 8, 4), "steps is 8 after 12: .* the stage before has 16. A halving to 8 begins "
                            "at a power of two times 8"),
                        ((32, 8), "steps is 8 after 32"), ((4, 4), "steps is 4 after 4"),
                        ((2, 4), "steps is 4 after 2")):
        with pytest.raises(RequestError, match=message):
            [check(stage) for stage in stages(*wrong)]
