"""MLCM beyond its identities: states without data, what is asked at which times, stages, and what is refused."""
import pytest
import torch

from stepdistill.diffusion.flow_map import flow_map
from stepdistill.diffusion.solvers import ddim
from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Trained
from stepdistill.methods.consistency.mlcm import MLCM, Settings
from stepdistill.proofs.mlcm import made
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check

from .players import spelled

F64 = torch.float64


def halved(problem: Problem) -> FunctionRole:
    return FunctionRole(problem.schedule, lambda x, t, cond: x / 2, "x0")


@pytest.mark.parametrize("nodes, steps", [(40, 8), (40, 1), (6, 2), (5, 5)])
def test_within_segments_s_is_a_node_below_and_r_the_start(nodes, steps):
    problem = Problem(0, "flow")
    method = made(problem, halved(problem), steps, nodes=nodes)
    t, s, r = method.times(problem.step(20_000))
    assert len(t.unique()) == nodes and torch.allclose(t - s, torch.full_like(t, 1 / nodes))
    assert torch.equal(r, ((t * steps - 1e-9).floor() / steps).clamp(min=0)) and (r <= s).all()
    assert sorted(r.unique().tolist()) == pytest.approx(sorted(e.landing for e in method.sampler.evaluations), abs=1e-6)


@pytest.mark.parametrize("ends, steps", [(8, 4), (8, 3), (5, 1)])
def test_of_the_whole_t_is_an_end_s_the_one_below_and_all_land_on_the_data(ends, steps):
    problem = Problem(0, "flow")
    method = made(problem, halved(problem), steps, stage="whole", ends=ends)
    t, s, r = method.times(problem.step(20_000))
    assert sorted(t.unique().tolist()) == pytest.approx([i / ends for i in range(1, ends + 1)]) and (r == 0).all()
    assert torch.allclose(t - s, torch.full_like(t, 1 / ends))
    assert {round(time * ends, 6) for time in method.sampler.times.tolist()} <= set(range(1, ends + 1))


@pytest.mark.parametrize("noise", NAMES)
@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_state_is_where_a_solver_of_even_steps_comes_and_smaller_times_take_more_of_them(noise, count):
    """One sample after another, by as many steps as it needs."""
    problem = Problem(1, noise)
    batch, step = problem.batch(40, data=False), problem.step(40)
    student = halved(problem)
    method = made(problem, student, state_steps=count)
    method.loss(batch, step)
    x_t, t, _ = student.calls[-1]
    start, mean = step.normal("start", batch.shape).double(), problem.guided_cond(1, problem.w)
    asked = {}
    for i in range(40):
        ways = [1 - j / count for j in range(count) if 1 - j / count > t[i] + 1e-12]
        times = torch.tensor([*ways, t[i].item()], dtype=F64)
        known = ddim(problem.teacher, start[i:i + 1], times, mean)
        assert torch.allclose(x_t[i:i + 1].double(), known, atol=2e-6)
        asked[round(t[i].item(), 6)] = len(times) - 1
    assert [asked[key] for key in sorted(asked)] == sorted(asked.values(), reverse=True)
    assert max(asked.values()) <= count and asked.get(1.0, 0) == 0


@pytest.mark.parametrize("noise", NAMES)
def test_a_state_of_the_whole_is_a_whole_sample_of_the_student_under_noise_of_its_own(noise):
    problem = Problem(2, noise)
    batch, step, student = problem.batch(300, data=False), problem.step(300), halved(problem)
    method = made(problem, student, stage="whole")
    method.loss(batch, step)
    sampled = student.calls[:4]
    assert [t[0].item() for _, t, _ in sampled] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert torch.allclose(sampled[0][0].double(), step.normal("start", batch.shape).double(), rtol=1e-3)
    x_t, t, cond = student.calls[-1]
    noise_of = lambda alpha: (x_t - alpha * sampled[-1][0] / 2) / problem.schedule.sigma(t)[:, None]
    fresh = noise_of(problem.schedule.alpha(t)[:, None]).double()
    assert torch.allclose(fresh, step.normal("noise", batch.shape).double(), atol=1e-4) and cond is batch.cond


@pytest.mark.parametrize("noise", NAMES)
@pytest.mark.parametrize("stage, n", [("segments", 1), ("whole", 3)])
def test_the_bridge_is_the_guided_teacher_s_and_the_target_is_held_fixed(noise, stage, n):
    problem = Problem(3, noise)
    leaf = torch.ones((), dtype=F64, requires_grad=True)
    student = FunctionRole(problem.schedule, lambda x, t, cond: leaf * x.double() / 2, "x0")
    method, batch, step = made(problem, student, stage=stage), problem.batch(200, data=False), problem.step(200)
    loss = method.loss(batch, step)["consistency"]
    t, s, r = method.times(step)
    (_, inner, _), (x_t, asked, _) = student.calls[-2:]
    assert torch.equal(asked, t) and torch.equal(inner, torch.where(s > r, s, t)) and (s == r).any()
    times = torch.stack([t + (s - t) * i / n for i in range(n + 1)])
    x_s = ddim(problem.teacher, x_t.double(), times, problem.guided_cond(200, problem.w))
    target = torch.where((s > r)[:, None], flow_map(halved(problem), x_s, inner, r), x_s)
    known = (flow_map(FunctionRole(problem.schedule, lambda x, u, cond: leaf * x / 2, "x0"), x_t.double(), t, r)
             - target).square().mean()
    assert loss.item() == pytest.approx(known.item(), rel=1e-5)
    found, right = (torch.autograd.grad(each, leaf)[0].item() for each in (loss, known))
    assert found == pytest.approx(right, rel=1e-4)


def test_what_is_served():
    assert spelled(MLCM, Settings(), 8, "vp").scheduler == "DDIMScheduler"
    whole = spelled(MLCM, Settings(stage="whole"), 4, "vp")
    assert whole.scheduler == "LCMScheduler" and whole.config["original_inference_steps"] == 8
    assert spelled(MLCM, Settings(stage="whole"), 4, "flow").scheduler == "FlowMatchLCMScheduler"
    assert spelled(MLCM, Settings(stage="whole"), 3, "flow").call["sigmas"] == [1.0, 0.75, 0.375]
    with pytest.raises(ValueError, match="found 3, and 2 or 4 would be right"):
        spelled(MLCM, Settings(nodes=30), 3, "vp")
    with pytest.raises(ValueError, match="ends that divide 1000, its times; found 6"):
        spelled(MLCM, Settings(stage="whole", ends=6), 3, "vp")


@pytest.mark.parametrize("steps, settings, says", [
    (3, {"nodes": 40}, "3 steps want a multiple of 3 as nodes, and 40 nodes one of 1, 2, 4, 5, 8, 10, 20, 40 as steps"),
    (8, {"nodes": 50}, "8 steps want a multiple of 8 as nodes"),
    (9, {"stage": "whole", "ends": 8}, "ends = 8 serves 1 to 8 steps; found 9")])
def test_steps_that_do_not_fit_are_refused_before_a_teacher_is_loaded(steps, settings, says, monkeypatch):
    monkeypatch.setattr("stepdistill.run.setup.load_teacher", None)
    recipe = Recipe.load("toy/mlcm", {"stages": [{"steps": steps, "settings": settings}]})
    with pytest.raises(RequestError, match=f"steps is {steps}, which cannot be sampled: mlcm.*{says}"):
        check(recipe)


def test_data_are_refused():
    with pytest.raises(RequestError, match="images is given, but mlcm trains on prompts"):
        Recipe.load("toy/mlcm", {"data.prompts": None, "data.images": "assets/toy"})


def test_stages_of_fewer_segments_and_then_the_whole():
    stages = Recipe.load("toy/mlcm").stages
    assert [(stage.method_settings().stage, stage.steps) for stage in stages] == [("segments", 8), ("segments", 4),
                                                                                  ("whole", 4)]
    assert not any(stage.taught_by_previous for stage in stages)
    for stage in stages:
        check(stage)


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"stage": "all"}, {"state_steps": 0}, {"ends": 0},
                                   {"bridge_steps": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize("full", [True, False])
def test_needs(full):
    assert MLCM.needs(Settings(), full) == {"teacher": Frozen(), "student": Trained("teacher")}
