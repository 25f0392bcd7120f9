import pytest
import torch

from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.diffusion.views import viewed
from stepdistill.losses.regression import squared
from stepdistill.methods.trajectory.reflow import Reflow, Settings, along
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.proofs.reflow import made, straight

from .players import SCHEDULES, spelled


@pytest.mark.parametrize("noise", NAMES)
def test_a_student_that_knows_the_pictures_has_no_loss_and_is_asked_on_the_lines(noise):
    problem = Problem(2, noise)
    batch = problem.paired(200)
    student = FunctionRole(problem.schedule, lambda x, t, cond: batch.x0, problem.kind)
    assert made(problem, student).loss(batch, problem.step(200))["velocity"] < 1e-18
    ((x_t, t, cond),) = student.calls
    s, start = problem.schedule, torch.ones_like(t)
    eps = (batch.pairs.noise - s.alpha(start)[:, None] * batch.x0) / s.sigma(start)[:, None]
    torch.testing.assert_close(x_t, s.alpha(t)[:, None] * batch.x0 + s.sigma(t)[:, None] * eps)
    assert cond is batch.cond


@pytest.mark.parametrize("noise", NAMES)
def test_the_loss_is_that_of_the_velocity_of_the_student_viewed_as_a_flow(noise):
    """In a flow's coordinates the line is straight in time, and the derivative of it is what is regressed."""
    problem = Problem(4, noise)
    batch, step, student, flow = problem.paired(64), problem.step(64), straight(problem, 3.0), RectifiedFlow()
    method = made(problem, student)
    found = method.loss(batch, step)["velocity"]
    t = method.time(step.uniform("t"))
    place = flow.time_at(problem.schedule.angle(t))
    x_t, _, cond = student.calls[0]
    x = x_t / (problem.schedule.alpha(t) + problem.schedule.sigma(t))[:, None]
    velocity = (x - batch.x0) / place[:, None]                 # from y, where the line is at 0, to x
    assert (squared(viewed(student, flow)(x, place, cond).velocity, velocity).mean().item()
            == pytest.approx(found.item(), rel=1e-9))


@pytest.mark.parametrize("noise", NAMES)
def test_times_are_uniform_along_the_line(noise):
    schedule = SCHEDULES[noise][0]
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = along(schedule)(u)
    place = RectifiedFlow().time_at(schedule.angle(t))
    torch.testing.assert_close(place.diff(), (place[-1] - place[0]).expand(100) / 100, rtol=1e-6, atol=0)
    assert (t[0].item() == pytest.approx(1e-3, abs=1e-12) and t[-1].item() == pytest.approx(1.0, abs=1e-9)
            and t.max() <= 1)


@pytest.mark.parametrize("noise", NAMES)
@pytest.mark.parametrize("steps", [1, 4])
def test_distillation_asks_at_the_sampler_s_times_alone(noise, steps):
    problem = Problem(0, noise)
    student = straight(problem, 1.0)
    made(problem, student, steps, distil=True).loss(problem.paired(100), problem.step(100))
    assert student.calls[0][1].unique().tolist() == pytest.approx([(i + 1) / steps for i in range(steps)])


def test_in_one_step_of_a_flow_distillation_is_regression_of_the_picture():
    problem, wrong = Problem(5, "flow"), 0.3
    batch = problem.paired(32)
    student = FunctionRole(problem.schedule, lambda x, t, cond: batch.x0 + wrong, problem.kind)
    sampler = made(problem, student).sampler
    for settings, known in ((Settings(distil=True), wrong**2), (Settings(distil=True, loss="huber", huber_c=0.4), 0.1)):
        found = Reflow(settings, {"student": student}, 1.0, sampler).loss(batch, problem.step(32))["velocity"]
        assert found.item() == pytest.approx(known, rel=1e-9)                 # sqrt(0.09 + 0.16) - 0.4


@pytest.mark.parametrize("wrong", [{"loss": "lpips"}, {"huber_c": 0.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_what_serves_it():
    assert spelled(Reflow, Settings(), 4, "vp").scheduler == "DDIMScheduler"
    assert spelled(Reflow, Settings(), 4, "flow").scheduler == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(ValueError, match="found 3, and 2 or 4"):
        spelled(Reflow, Settings(), 3, "vp")
