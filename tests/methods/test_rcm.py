"""rCM beyond its identities: what a rollout asks, when the scores come in, their weight, and what is refused."""
from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.continuous import start
from stepdistill.methods.base import Frozen, Trained
from stepdistill.methods.hybrid.rcm import RCM, Settings
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.proofs.rcm import made, rolls

from .players import spelled


def halved(problem: Problem) -> FunctionRole:
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    role = FunctionRole(problem.schedule, lambda x, t, cond: leaf * x / 2, "x0")
    role.leaf = leaf
    return role


@pytest.mark.parametrize("noise", NAMES)
def test_rollouts_have_every_length_and_descend_from_where_sampling_begins(noise):
    problem = Problem(0, noise)
    student = halved(problem)
    method = made(problem, student, problem.teacher)
    for length, step in enumerate(rolls(problem), 1):
        student.calls.clear()
        x = method.rolled(problem.batch(256), step)
        times = [t for _, t, _ in student.calls]
        assert (len(times) == length and (times[0] - start(problem.schedule)).abs().max() < 1e-9
                and x.shape == (256, problem.dim))
        assert all((after <= before + 1e-9).all() for before, after in zip(times, times[1:]))


@pytest.mark.parametrize("noise", NAMES)
def test_gradients_flow_through_the_last_evaluation_alone(noise):
    """d x / d leaf is half of what the last evaluation is given."""
    problem = Problem(1, noise)
    student = halved(problem)
    x = made(problem, student, problem.teacher).rolled(problem.batch(64), rolls(problem, 64)[3])
    slope, = torch.autograd.grad(x.sum(), student.leaf)
    assert slope.item() == pytest.approx((student.calls[-1][0] / 2).sum().item(), rel=1e-5)


def test_the_scores_come_in_where_the_tangent_is_whole():
    problem = Problem(2, "flow")
    method = made(problem, halved(problem), problem.teacher, warmup=0.2, derivative="difference")
    names = [list(method.student_loss(problem.batch(16), problem.step(16, progress=p))) for p in (0.0, 0.199, 0.2, 0.9)]
    assert names == [["consistency"]] * 2 + [["consistency", "matching"]] * 2


@pytest.mark.parametrize("weight, known", [(None, 3**0.5 / 50), (0.7, 0.7)])
def test_the_weight_of_the_scores(weight, known):
    """Beside a weight of 1: by default the released 1 beside 100, of sums and a tangent of norm 1, is sqrt(D) / 50 of
    means."""
    problem = next(found for seed in range(20) if (found := Problem(seed, "vp")).dim == 3)
    slopes = []
    for chosen in (weight, 1.0):
        student = halved(problem)
        method = made(problem, student, problem.law(problem.covariance * 2), matching_weight=chosen,
                      derivative="difference")
        losses = method.student_loss(problem.batch(64), problem.step(64, progress=0.5))
        slopes.append(torch.autograd.grad(losses["matching"], student.leaf)[0].item())
    assert slopes[0] / slopes[1] == pytest.approx(known, rel=1e-6)


def test_the_critic_s_error_is_that_of_v():
    problem = Problem(3, "vp")
    critic, step, batch = halved(problem), problem.step(500, "critic"), problem.batch(500)
    method = made(problem, halved(problem), critic)
    found = method.critic_loss(batch, step)["denoising"]
    x, t = method.rolled(batch, step).detach(), method.level(step.uniform("t")) * torch.pi / 2
    x_t = t.cos()[:, None] * x + t.sin()[:, None] * step.normal("noise", batch.shape)
    assert found.item() == pytest.approx((((x_t / 2 - x) / t.sin()[:, None]) ** 2).mean().item(), rel=1e-4)
    found.backward()
    assert method.roles["student"].leaf.grad is None and critic.leaf.grad is not None


def test_who_is_needed_and_how_it_is_sampled():
    needs = {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")}
    assert RCM.needs(Settings(), True) == needs
    problem = Problem(4, "vp")
    student, critic = made(problem, halved(problem), problem.teacher, critic_steps=3).updates()
    assert (student.trains, critic.trains, critic.repeat, critic.shares) == (("student",), ("critic",), 3, 0)
    assert spelled(RCM, Settings(), 2, "flow").call["sigmas"] == pytest.approx([0.999, 2 / 3])


@pytest.mark.parametrize("wrong, message", [
    ({"std": 0.0}, "std"), ({"warmup": -0.1}, "share of the training"), ({"derivative": "jvp"}, "found 'jvp'"),
    ({"critic_steps": 0}, "critic_steps"),
    ({"rollout_steps": 0}, "rollout_steps"), ({"matching_weight": 0.0}, "matching_weight"), ({"shift": 0.0}, "shift")])
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
