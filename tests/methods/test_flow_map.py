"""Flow maps beyond their identities: where students land, who is asked what, how they are told, and what is refused."""
import json

import pytest
import torch

from stepdistill.api import train
from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Trained
from stepdistill.methods.consistency.flow_map import FlowMap, Settings
from stepdistill.proofs.flow_map import made, mapped
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check

from .players import spelled

F64 = torch.float64


def halved(problem: Problem) -> FunctionRole:
    return FunctionRole(problem.schedule, lambda x, t, cond: x / 2, "x0")


@pytest.mark.parametrize("noise", NAMES)
@pytest.mark.parametrize("alike", [0.0, 0.5])
def test_r_is_the_earlier_draw_or_the_data_s_time(noise, alike):
    problem = Problem(0, noise)
    method = made(problem, halved(problem), 1.0, alike=alike, mean=0.0, std=2.5)
    t, r = method.times(problem.step(20_000))
    assert (r <= t).all() and (r < t).double().mean() == pytest.approx(1 - alike, abs=0.05)
    known = method.own.time_at(torch.atan2(t, 1 - t))
    assert known.min() >= 0.001 and known.max() < 1 and ((r == 0) | (r >= method.first)).all() and (r == 0).any()


@pytest.mark.parametrize("noise", NAMES)
def test_a_student_is_told_its_own_time_of_the_landing_and_the_teacher_nothing(noise):
    """At derivative: difference eulerian asks at t and twice for the slope; r stays."""
    problem, told = Problem(1, noise), []
    student = FunctionRole(problem.schedule, lambda x, t, cond: leaf * x / 2, "x0")
    teacher = FunctionRole(problem.schedule, lambda x, t, cond: told.append(cond.r) or x / 2, "x0")
    leaf = torch.ones((), dtype=F64, requires_grad=True)
    method = made(problem, student, 1.0, teacher=teacher, derivative="difference")
    loss = method.loss(problem.batch(64), problem.step(64, progress=0.5))["tangent"]
    t, r = method.times(problem.step(64))
    own = method.own.time_at(torch.atan2(r, 1 - r))
    assert len(student.calls) == 3 and all(torch.equal(cond.r, own) for _, _, cond in student.calls) and told == [None]
    assert (student.calls[2][1] < student.calls[0][1]).all() and torch.isfinite(torch.autograd.grad(loss, leaf)[0])


@pytest.mark.parametrize("noise", NAMES)
def test_lagrangian_asks_the_teacher_where_the_student_lands_and_the_student_at_later_landings(noise):
    problem = Problem(2, noise)
    student, teacher = mapped(problem, 1.0), FunctionRole(problem.schedule, lambda x, t, cond: x / 2, "x0")
    method = made(problem, student, 1.0, teacher=teacher, form="lagrangian", derivative="difference")
    method.times = lambda step: (torch.full((64,), 0.8, dtype=F64), torch.full((64,), 0.3, dtype=F64))
    method.loss(problem.batch(64), problem.step(64, progress=0.5))
    (x, t, cond), _, (again, at, later) = student.calls
    (landed, r, _), = teacher.calls
    assert torch.equal(r, cond.r) and torch.allclose(landed, problem.flow(x, t, r, 1.0), atol=1e-9)
    assert torch.equal(again, x) and torch.equal(at, t)
    width = torch.atan2(torch.tensor(0.33, dtype=F64), torch.tensor(0.67, dtype=F64))
    assert torch.allclose(later.r, method.own.time_at(width.expand(64)))


def test_at_equal_times_the_tangent_points_to_the_teacher_s_velocity():
    problem = Problem(3, "flow")
    for form in ("eulerian", "lagrangian"):
        method = made(problem, halved(problem), problem.w, form=form, alike=0.999, derivative="pair")
        batch, step = problem.batch(400), problem.step(400, progress=0.9)
        t, r = method.times(step)
        x = problem.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        g = (problem.teacher(x, t, problem.guided_cond(400, problem.w)).velocity - (x - x / 2) / t[:, None])[t == r]
        aim = g / (g.square().mean(1, keepdim=True).sqrt() + 0.1)
        only = step.ids[t == r]
        batch = type(batch)(only, batch.cond[t == r], batch.x0[t == r])
        found = method.loss(batch, type(step)(**{**vars(step), "ids": only}))["tangent"]
        assert found.item() == pytest.approx(aim.square().mean().item(), rel=1e-5)


def test_a_run_tells_its_student_where_it_lands(tmp_path):
    run = train(Recipe.load("toy/flow_map", {"train.updates": 2, "train.warmup": 0, "data.batch": 8}),
                out=tmp_path / "run")
    assert (run / "samples" / "step-000002.png").is_file()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


@pytest.mark.parametrize("stages, found", [
    ([{}, {"method": "cd", "settings": {}, "teacher": "base"}], "is cd after flow_map"),
    ([{}, {"teacher": "previous"}], "is flow_map after flow_map"),
])
def test_a_student_that_reads_its_landing_is_no_teacher_and_no_start_of_another_method(stages, found):
    plain = Recipe.load("toy/flow_map").resolved()
    with pytest.raises(RequestError, match=f"{found}, whose student reads where its steps land: only flow_map "
                       "can go on"):
        check(Recipe.load({**plain, "stages": stages}))
    check(Recipe.load({**plain, "stages": [{}, {"steps": 2}]}))


def test_what_is_served():
    assert spelled(FlowMap, Settings(), 4, "vp").scheduler == "DDIMScheduler"
    assert spelled(FlowMap, Settings(), 4, "flow").call["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="found 3, and 2 or 4 would be right"):
        spelled(FlowMap, Settings(), 3, "vp")


@pytest.mark.parametrize("wrong", [{"form": "semi"}, {"derivative": "central"}, {"std": 0.0}, {"damping": 0.0},
                                   {"width": 1e-4}, {"warmup": 1.1},
                                   {"alike": 1.0}, {"solver_steps": 0}, {"output_weight": -1.0},
                                   {"velocity_weight": -1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize("full", [True, False])
def test_needs(full):
    assert FlowMap.needs(Settings(), full) == {"teacher": Frozen(), "student": Trained("teacher", reads=("r",))}
