"""iCT beyond its identities: growing grids, by which law pairs are drawn, one dropout for both passes, and what is
refused."""
from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stepdistill.errors import RequestError
from stepdistill.methods.base import Trained
from stepdistill.methods.consistency.ict import ICT, Settings
from stepdistill.proofs.ict import made
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check

from .players import spelled

F64 = torch.float64


def halved(problem: Problem) -> FunctionRole:
    return FunctionRole(problem.schedule, lambda x, t, cond: x / 2, "x0")


@pytest.mark.parametrize("progress, count", [(0.0, 10), (0.12, 10), (0.126, 20), (0.5, 160), (0.87, 640), (0.88, 1280),
                                             (0.999, 1280)])
def test_the_grid_doubles_seven_times_at_equal_intervals(progress, count):
    """Of sigma / alpha from 0 to infinity; t = 1 and 0.5, where a student of two steps is asked, are nodes, 0.5 one
    more."""
    problem = Problem(0, "flow")
    method = made(problem, halved(problem), 2, first_nodes=10, last_nodes=1280)
    t, s = method.times(problem.step(200_000, progress=progress))
    assert t.max() == 1 and (0.5 in t.tolist() or count > 600) and s.min() == 0 and (s < t).all()
    assert len(t.unique()) == pytest.approx(count + 1, rel=0.03)         # the rarest of many are not drawn
    nodes = torch.cat([t, s]).unique()
    assert torch.equal(s, nodes[torch.searchsorted(nodes, t) - 1]) or count > 600
    high = (nodes[-2] / (1 - nodes[-2])).item()                          # one step below 80
    assert count > 600 or high == pytest.approx((80 ** (1 / 7) - (80 ** (1 / 7) - 0.002 ** (1 / 7)) / count) ** 7,
                                                rel=1e-9)


def test_a_discrete_schedule_has_no_more_nodes_than_times():
    problem = Problem(0, "vp")
    t, s = made(problem, halved(problem), 4, first_nodes=10,
                last_nodes=1280).times(problem.step(200_000, progress=0.99))
    for u in (t, s):
        assert torch.equal((u * 1000).round() / 1000, u)
    assert 0.001 == s.min() and t.max() == 1 and (s < t).all() and ((t - s) < 0.02).all()


@pytest.mark.parametrize("noise", NAMES)
def test_the_levels_are_drawn_by_a_log_normal_law(noise):
    """Below each node lies the share that N(mean, std^2) has there, of what it has on the whole grid."""
    problem = Problem(1, noise)
    method = made(problem, halved(problem), 4, first_nodes=40, last_nodes=40, mean=-0.5, std=1.2)
    t, s = method.times(problem.step(100_000))
    place = lambda u: 0.5 * (1 + math.erf((math.log(method.level(torch.tensor([u], dtype=F64)).item()) + 0.5) / 1.2
                                          / math.sqrt(2)))
    low, high = place(s.min().item()), place(t.max().item())
    for node in t.unique()[::7].tolist():
        assert (t <= node).double().mean().item() == pytest.approx((place(node) - low) / (high - low), abs=0.006)


def test_the_loss_of_a_student_that_shrinks_every_state():
    """Whole samples: |x_t - x_s| / 2 is |eps - x_0| (t - s) / 2 on a flow, and sigma / alpha is t / (1 - t)."""
    problem = Problem(2, "flow")
    batch, step = problem.batch(500), problem.step(500)
    method = made(problem, halved(problem), 2, huber_c=0.1)
    t, s = method.times(step)
    off = (step.normal("noise", batch.shape).double() - batch.x0).norm(dim=1) * (t - s) / 2
    c, level = 0.1 * math.sqrt(problem.dim), lambda u: (u / (1 - u)).clamp(0.002, 80)
    known = ((off.square() + c * c).sqrt() - c) / math.sqrt(problem.dim) / (level(t) - level(s))
    assert method.loss(batch, step)["consistency"].item() == pytest.approx(known.mean().item(), rel=1e-6)


@pytest.mark.parametrize("noise", NAMES)
def test_the_target_is_the_student_itself_under_one_dropout_and_takes_no_gradient(noise):
    problem, dropout, seen = Problem(3, noise), nn.Dropout(0.5), []
    leaf = torch.ones((), dtype=F64, requires_grad=True)

    def x0(x, t, cond):
        seen.append((dropout(torch.ones_like(x)), torch.is_grad_enabled()))
        return leaf * x * seen[-1][0]
    student = FunctionRole(problem.schedule, x0, "x0")
    method, batch, before = made(problem, student), problem.batch(300), torch.get_rng_state()
    for index in (0, 1):
        method.loss(batch, problem.step(300, index=index))["consistency"].backward()
    (target, off), (mask, on), (_, _), (later, _) = seen
    assert torch.equal(target, mask) and not torch.equal(mask, later) and (off, on) == (False, True)
    assert torch.equal(torch.get_rng_state(), before) and torch.isfinite(leaf.grad)
    t, s = method.times(problem.step(300))
    assert (torch.equal(student.calls[0][1], s) and torch.equal(student.calls[1][1], t)
            and student.calls[1][2] is batch.cond)


@pytest.mark.parametrize("full", [True, False])
def test_needs(full):
    assert ICT.needs(Settings(), full) == {"student": Trained("teacher")}


def test_what_is_served():
    assert spelled(ICT, Settings(), 4, "vp").scheduler == "LCMScheduler"
    assert spelled(ICT, Settings(), 4, "flow").call["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"1 to 10 steps; found {steps}"):
            spelled(ICT, Settings(), steps, "flow")


@pytest.mark.parametrize("wrong", [{"first_nodes": 1}, {"last_nodes": 9}, {"std": 0.0}, {"huber_c": 0.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


SAMPLES = {"images": None, "cache": False, "count": 64, "samples": {"prompts": "shapes", "guidance": 3.0}}


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("shapes/ict", {"guidance": 3.0}, "--set guidance: guidance is 3.0, but ict asks no teacher that could be guided: "
                                      "let it be 1, or train on pictures that a guided teacher made"),
    ("toy/ict", {"guidance": 2.0}, "guidance is 2.0, but ict asks no teacher"),
    ("shapes/ict", {"guidance": [1.0, 3.0]}, "guidance is (1.0, 3.0), but ict asks no teacher"),
    ("shapes/ict", {"negative_prompt": "blurred"}, "negative_prompt is given, but ict asks no teacher that could "
     "read it: leave it out"),
    ("shapes/ict", {"guidance_rescale": 0.7}, "guidance_rescale is given, but ict asks no teacher that could read "
     "it: leave it out"),
    ("shapes/ict", {"stages": [{"method": "lcm"}, {"teacher": "previous"}]},
     "method is ict, which asks no teacher, but that of this stage is "
                                                                             "previous: leave teacher: previous out"),
])
def test_what_only_a_teacher_reads_is_refused_before_anything_is_loaded(name, changes, message):
    with pytest.raises(RequestError) as caught:
        check(Recipe.load(name, changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"stages": [{"method": "lcm"}, {"method": "ict"}]},
                                     {"data": {"batch": 8, **SAMPLES}, "negative_prompt": "blurred"}])
def test_what_is_right_in_its_place_is_not_refused(changes):
    check(Recipe.load("shapes/ict", changes))
