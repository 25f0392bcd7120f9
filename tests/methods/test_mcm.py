"""MCM beyond its identities: the times of growing grids, who is asked what, and what is refused."""
import pytest
import torch

from stepdistill.diffusion.flow_map import secant_target
from stepdistill.diffusion.solvers import addim_step
from stepdistill.methods.base import Frozen, Trained
from stepdistill.methods.consistency.mcm import MCM, Settings
from stepdistill.proofs.mcm import made
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem

from .players import spelled

F64 = torch.float64


def halved(problem: Problem) -> FunctionRole:
    return FunctionRole(problem.schedule, lambda x, t, cond: x / 2, "x0")


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("progress, count", [(0.0, 64), (0.25, 286), (0.5, 1280), (0.9, 1280)])
def test_the_grid_grows_from_64_nodes_to_1280_half_way(steps, progress, count):
    """Every node is drawn, those of all segments alike; s is one below; r is an edge of the student's own sampler."""
    problem = Problem(0, "flow")
    method = made(problem, halved(problem), 1.0, steps, first_nodes=64, last_nodes=1280)
    t, s, r = method.times(problem.step(30_000, progress=progress))
    nodes = len(t.unique())
    assert nodes % steps == 0 and abs(nodes - count) <= steps
    assert torch.allclose(t - s, torch.full_like(t, 1 / nodes)) and torch.equal(r, ((t * steps - 1e-9).floor() / steps))
    landings = [e.landing for e in method.sampler.evaluations]
    assert sorted(r.unique().tolist()) == pytest.approx(sorted(landings), abs=1e-6) and (r <= s).all()
    inside = (s == r).double().mean().item()
    assert inside == pytest.approx(steps / nodes, rel=0.2)


@pytest.mark.parametrize("noise", NAMES)
def test_the_student_carries_on_within_the_segment_without_gradient_and_is_asked_twice(noise):
    problem = Problem(1, noise)
    leaf = torch.ones((), dtype=F64, requires_grad=True)
    student = FunctionRole(problem.schedule, lambda x, t, cond: leaf * x / 2 + 0 * torch.is_grad_enabled(), "x0")
    method, batch = made(problem, student, 1.0), problem.batch(500)
    loss = method.student_loss(batch, problem.step(500))["consistency"]
    t, s, r = method.times(problem.step(500))
    (_, inner, _), (x_t, asked, cond) = student.calls
    assert torch.equal(inner, torch.where(s > r, s, t)) and torch.equal(asked, t) and cond is batch.cond
    assert torch.isfinite(torch.autograd.grad(loss, leaf)[0]) and (s == 0).any()


def test_at_the_start_of_a_segment_the_teacher_s_step_is_the_target_whatever_the_student_says():
    """There the aim is the x_0 whose step lands on x_s: what aDDIM gives back is in it."""
    problem = Problem(2, "flow")
    batch, step = problem.batch(64), problem.step(64)
    method = made(problem, halved(problem), 1.0, 40, eta=0.75, loss="squared", weight="truncated")
    t, s, r = method.times(step)
    assert torch.equal(s, r)
    x_t = problem.schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
    p = problem.teacher(x_t, t, batch.cond)
    x_s = addim_step(p, s, 0.75 * (p.x0 - batch.x0).square().mean(1))
    aim = secant_target(x_t, x_s, t, r, problem.schedule)
    snr = ((1 - t) / t).square().clamp(min=1)
    known = (snr * (x_t / 2 - aim).square().mean(1)).mean()
    assert method.student_loss(batch, step)["consistency"].item() == pytest.approx(known.item(), rel=1e-9)


def test_the_norm_has_no_gradient_where_nothing_is_off():
    """A student that is the teacher, at the start of training: at the last node its x_0 is the aim itself."""
    problem = Problem(3, "flow")
    shift = torch.zeros((), dtype=F64, requires_grad=True)
    student = FunctionRole(problem.schedule, lambda x, t, cond: problem.teacher(x, t, cond).x0 + shift, "x0")
    method = made(problem, student, 1.0)
    method.times = lambda step: tuple(torch.full((64,), u, dtype=F64) for u in (1 / 40, 0.0, 0.0))
    loss = method.student_loss(problem.batch(64), problem.step(64))["consistency"]
    assert loss < 1e-12 and torch.isfinite(torch.autograd.grad(loss, shift)[0])


def test_what_is_served():
    assert spelled(MCM, Settings(), 4, "vp").scheduler == "DDIMScheduler"
    assert spelled(MCM, Settings(), 4, "flow").call["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    for steps in (0, 65):
        with pytest.raises(ValueError, match=f"1 to 64 steps; found {steps}"):
            spelled(MCM, Settings(), steps, "flow")
    with pytest.raises(ValueError, match="found 3, and 2 or 4 would be right"):
        spelled(MCM, Settings(), 3, "vp")
    with pytest.raises(ValueError, match="let guidance be 1; found 2.0"):
        spelled(MCM, Settings(bridge="data"), 4, "vp", 2.0)


@pytest.mark.parametrize("wrong", [{"first_nodes": 0}, {"last_nodes": 63}, {"grown": 0.0}, {"grown": 1.1},
                                   {"eta": -0.1}, {"bridge": "ddim"},
                                   {"loss": "huber"}, {"weight": "snr"}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize("full", [True, False])
def test_needs(full):
    assert MCM.needs(Settings(), full) == {"teacher": Frozen(), "student": Trained("teacher")}
