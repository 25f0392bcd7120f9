"""SCFlow beyond its identities: the times of neighbours, who is asked what, what joins when, and what is refused."""
import pytest
import torch

from stepdistill.methods.base import Follows, Frozen, Heads, Trained
from stepdistill.methods.consistency.scflow import SCFlow, Settings
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.proofs.scflow import made

from .players import spelled

F64 = torch.float64


def halved(problem: Problem, leaf: torch.Tensor | float = 1.0) -> FunctionRole:
    return FunctionRole(problem.schedule, lambda x, t, cond: leaf * x / 2, "x0")


def test_neighbours_lie_within_reach_on_both_sides():
    problem = Problem(0, "flow")
    t, low, high = made(problem, halved(problem), 1.0, reach=0.3).times(problem.step(20_000))
    assert (low <= t).all() and (high >= t).all() and low.min() >= 0 and high.max() <= 1
    assert ((t - low).max() <= 0.3 and (high - t).max() <= 0.3
            and torch.allclose(1000 * t, (1000 * t).round(), atol=1e-9))
    near = t < 0.2                                     # there the reach below is t itself
    assert (low / t)[near].mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("noise", NAMES)
def test_the_teacher_is_asked_once_and_the_average_below_and_above(noise):
    problem, leaf = Problem(1, noise), torch.ones((), dtype=F64, requires_grad=True)
    student, target, teacher = halved(problem, leaf), halved(problem, leaf), halved(problem, leaf)
    method = made(problem, student, 1.0)
    method.target, method.teacher = target, teacher
    batch, step = problem.batch(300), problem.step(300)
    losses = method.student_loss(batch, step)
    t, low, high = method.times(step)
    assert (losses.keys() == {"consistency", "high", "self"} and len(teacher.calls) == 1
            and torch.equal(teacher.calls[0][1], t))
    (_, first, _), (_, second, _) = target.calls
    inside = low >= 0.1
    assert torch.equal(first, torch.where(inside, low, t)) and torch.equal(second, high)
    assert [each[1].unique().tolist() == [1.0] for each in student.calls] == [False, True, False]
    assert torch.equal(student.calls[2][1], t)


def test_below_the_anchor_the_data_are_the_target():
    problem = Problem(2, "flow")
    student = FunctionRole(problem.schedule, lambda x, t, cond: 0 * x, "x0")
    batch, step = problem.batch(2000), problem.step(2000)
    method = made(problem, student, 1.0, anchor=0.4)
    low = method.times(step)[1]
    known = batch.x0[low < 0.4].square().sum() / batch.x0.numel()
    assert method.student_loss(batch, step)["consistency"].item() == pytest.approx(known.item(), rel=1e-6)


def test_the_self_correction_draws_towards_the_one_step_sample_which_takes_no_gradient_of_it():
    problem, one, few = (Problem(3, "flow"), *(torch.ones((), dtype=F64, requires_grad=True) for _ in range(2)))
    scale = lambda t: torch.where(t == 1, one, few)[:, None]
    student = FunctionRole(problem.schedule, lambda x, t, cond: scale(t) * x / 2, "x0")
    method, batch, step = made(problem, student, 1.0, self_weight=0.7), problem.batch(500), problem.step(500)
    loss = method.student_loss(batch, step)["self"]
    t, e = method.times(step)[0][:, None], step.normal("start", batch.shape).double()
    line = (1 - t) * e / 2 + t * e
    assert loss.item() == pytest.approx(0.7 * (line / 2 - e / 2).square().mean().item(), rel=1e-6)
    slope, = torch.autograd.grad(loss, few, retain_graph=True)
    inner = (t < 1)
    known = (0.7 * 2 * (line / 2 - e / 2) * line / 2 * inner).mean()
    assert slope.item() == pytest.approx(known.item(), rel=1e-6)


@pytest.mark.parametrize("index, joined", [(0, False), (999, False), (1000, True)])
@pytest.mark.parametrize("heads", [False, True])
def test_what_joins_after_the_warm_up(index, joined, heads):
    problem = Problem(4, "flow")
    role = (lambda x, t, cond: x[:, :2]) if heads else None
    method = made(problem, halved(problem), 1.0, warmup_updates=1000, discriminator=role)
    found = method.student_loss(problem.batch(8), problem.step(8, index=index)).keys()
    assert found == {"consistency", *(("high", "self") if joined else ()), *(("gan",) if heads else ())}


def test_roles_and_updates():
    needs = {"teacher": Frozen(), "student": Trained("teacher"), "target": Follows("student", 0.9)}
    assert SCFlow.needs(Settings(gan_weight=0.0), False) == needs
    assert SCFlow.needs(Settings(), True) == needs | {"discriminator": Heads("teacher")}
    problem = Problem(5, "vp")
    assert [u.trains for u in made(problem, halved(problem), 1.0).updates()] == [("student",)]
    updates = made(problem, halved(problem), 1.0, discriminator=lambda *_: None).updates()
    assert [(u.trains, u.shares) for u in updates] == [(("student",), 0), (("discriminator",), 1)]


def test_what_is_served():
    assert spelled(SCFlow, Settings(), 4, "vp").scheduler == "DDIMScheduler"
    assert spelled(SCFlow, Settings(), 4, "flow").call["sigmas"] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("wrong", [{"reach": 0.0}, {"reach": 1.1}, {"anchor": 0.0}, {"loss": "l1"}, {"huber_c": 0.0},
                                   {"high_weight": -1.0},
                                   {"self_weight": -1.0}, {"gan_weight": -1.0}, {"warmup_updates": -1},
                                   {"target_decay": 1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
