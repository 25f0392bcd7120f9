import pytest
import torch

from stepdistill.diffusion.flow_map import ddim_step, flow_map
from stepdistill.diffusion.triples import grid
from stepdistill.methods.base import Follows
from stepdistill.methods.trajectory.tract import TRACT, Settings
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.proofs.tract import NODES, closed, made

from .players import spelled


@pytest.mark.parametrize("steps", [1, 2, 4, 40])
def test_times(steps):
    """t on every node; s one node below; r the edge of the segment below t, an edge of the student's sampler."""
    problem = Problem(0, "vp")
    student = closed(problem, steps, 1.0)
    method = made(problem, steps, student, student)
    t, s, r = method.times(problem.step(2000))
    assert t.dtype == s.dtype == r.dtype == torch.float64
    assert len(t.unique()) == NODES and t.max() == 1 and t.min() == 1 / NODES
    torch.testing.assert_close(t - s, torch.full_like(t, 1 / NODES))
    assert torch.equal(r, ((t * steps - 1e-9).floor() / steps))
    assert (r <= s).all() and sorted(r.unique().tolist()) == pytest.approx([i / steps for i in range(steps)])
    landings = [e.landing for e in method.sampler.evaluations]
    assert sorted(landings) == pytest.approx(sorted(r.unique().tolist()), abs=1e-6)


@pytest.mark.parametrize("noise", NAMES)
def test_the_target_is_asked_inside_segments_without_gradient_and_never_past_their_end(noise):
    problem = Problem(1, noise)
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    student, target = closed(problem, 4, 1.0), FunctionRole(problem.schedule, lambda x, t, cond: leaf * x, "x0")
    batch, method = problem.batch(500), made(problem, 4, student, target)
    loss = method.loss(batch, problem.step(500))["closure"]
    t, s, r = method.times(problem.step(500))
    assert not loss.requires_grad and torch.isfinite(loss)
    ((_, asked, cond),) = target.calls
    assert torch.equal(asked[s > r], s[s > r]) and (asked > 0).all() and (s == 0).any() and cond is batch.cond


@pytest.mark.parametrize("noise", NAMES)
def test_at_the_end_of_a_segment_the_teacher_s_step_is_the_target_whatever_the_target_says(noise):
    """With as many segments as nodes the student is the teacher."""
    problem = Problem(2, noise)
    nonsense = FunctionRole(problem.schedule, lambda x, t, cond: x * 1e3, "x0")
    student = FunctionRole(problem.schedule,
                           lambda x, t, cond: problem.teacher(x, t, problem.guided_cond(len(t), problem.w)).x0, "x0")
    assert made(problem, NODES, student, nonsense).loss(problem.batch(200), problem.step(200))["closure"] < 1e-18


def test_all_nodes_of_a_segment_lead_to_one_place_at_the_fixed_point():
    """From two nodes of the teacher's own way, one step each of the student."""
    problem = Problem(3, "flow")
    student, z = closed(problem, 4, problem.w), problem.normal(16, problem.dim)
    method = made(problem, 4, student, student)
    t, s, r = (torch.full((16,), each, dtype=torch.float64) for each in (0.5, 0.5 - 1 / NODES, 0.25))
    cond = problem.guided_cond(16, problem.w)
    x_s = ddim_step(problem.teacher(z, t, cond), s)
    torch.testing.assert_close(flow_map(student, z, t, r), flow_map(student, x_s, s, r))
    assert torch.equal(method.edges, grid(4)) and torch.equal(method.grid, grid(NODES))


def test_the_step_counts_that_are_served():
    assert spelled(TRACT, Settings(), 4, "vp").scheduler == "DDIMScheduler"
    for schedule, steps in (("vp", 25), ("flow", 16)):
        with pytest.raises(ValueError, match=f"nodes, 40, into one segment a step: {steps} steps want a multiple "
                           f"of {steps}"):
            spelled(TRACT, Settings(), steps, schedule)
    with pytest.raises(ValueError, match="found 3, and 2 or 4 would be right"):
        spelled(TRACT, Settings(nodes=30), 3, "vp")
    assert spelled(TRACT, Settings(nodes=30), 3, "flow").call["num_inference_steps"] == 3


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"target_decay": 1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_the_target_follows_an_adapter_too():
    for full in (True, False):
        assert TRACT.needs(Settings(target_decay=0.25), full)["target"] == Follows("student", 0.25)
