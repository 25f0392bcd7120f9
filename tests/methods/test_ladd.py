from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.sampler import Sampler
from stepdistill.methods.adversarial.ladd import LADD, Settings
from stepdistill.proofs.problem import FunctionRole, Problem

from .players import spelled

COUNT = 400


def made(problem, student=None, discriminator=None, **settings) -> LADD:
    """A student that believes in what it is given."""
    student = student or FunctionRole(problem.schedule, lambda x_t, t, cond: x_t)
    roles = {"teacher": problem.teacher, "student": student, "discriminator": discriminator
             or (lambda x, t, cond: [x[:, :2]])}
    return LADD(Settings(**settings), roles, 1.0, problem.sampler(LADD.inference(Settings(), 4, problem.schedule)))


@pytest.mark.parametrize("settings", [{"shares": (0.5, 0.4)}, {"shares": (1.5, -0.5, 0, 0)}, {"shares": ()},
                                      {"shares": (1.0,)},
                                      {"warmup_updates": -1}, {"std": 0.0}, {"critic_steps": 0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="found"):
        Settings(**settings)


@pytest.mark.parametrize("noise", ["vp", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_every_time_of_its_samplers_is_one_that_it_trains_at(noise, steps):
    problem = Problem(0, noise)
    sampler = problem.sampler(LADD.inference(Settings(), steps, problem.schedule))
    assert isinstance(sampler, Sampler) and sampler.nfe == steps
    assert {round(t * 4, 9) for t in sampler.times.tolist()} <= {1, 2, 3, 4}


@pytest.mark.parametrize("steps", [0, 3, 8])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"divide 4; found {steps} steps"):
        spelled(LADD, Settings(), steps, "vp")


@pytest.mark.parametrize("index, expected", [(0, [0, 0, 0.5, 0.5]), (499, [0, 0, 0.5, 0.5]),
                                             (500, [0.7, 0.1, 0.1, 0.1])])
def test_it_warms_up_on_little_noise(index, expected):
    problem = Problem(0, "flow")
    method, batch = made(problem), problem.batch(COUNT)
    method.student_loss(batch, problem.step(COUNT, index=index))
    _, t, _ = method.student.calls[0]
    found = [(t == node).double().mean().item() for node in (1.0, 0.75, 0.5, 0.25)]
    assert sum(found) == 1 and found == pytest.approx(expected, abs=0.08)


def test_at_the_end_of_noise_the_student_sees_noise_alone():
    problem = Problem(0, "vp")
    method, batch, step = made(problem, warmup_updates=0), problem.batch(COUNT), problem.step(COUNT)
    method.student_loss(batch, step)
    x_t, t, _ = method.student.calls[0]
    noise = step.normal("start", (problem.dim,)).double()
    assert torch.equal(x_t[t == 1], noise[t == 1]) and not torch.isclose(x_t[t < 1], noise[t < 1]).any()


@pytest.mark.parametrize("noise", ["vp", "flow"])
def test_what_is_judged_lies_at_the_levels_of_a_flow(noise):
    """logit s ~ N(1, 1), s = sigma / (alpha + sigma), real and fake each with times and noise of their own."""
    problem, seen = Problem(0, noise), []
    method = made(problem, discriminator=lambda x, t, cond: seen.append(t) or [x[:, :2]])
    step = problem.step(COUNT)
    method.student_loss(problem.batch(COUNT), step)
    method.critic_loss(problem.batch(COUNT), problem.step(COUNT, "discriminator", kept=step.kept))
    assert len(seen) == 3 and not torch.equal(seen[1], seen[2])
    for t in seen:
        alpha, sigma = problem.schedule.alpha(t), problem.schedule.sigma(t)
        logit = (sigma / alpha).log()[t < 1]
        assert (logit.median().item() == pytest.approx(1.0, abs=0.2) and logit.quantile(0.1).item()
                == pytest.approx(1 - 1.2816, abs=0.3))


def test_the_heads_train_on_the_student_s_sample_and_not_the_student():
    problem = Problem(0, "vp")
    student = problem.affine()
    method, batch, step = made(problem, student, critic_steps=3), problem.batch(8), problem.step(8)
    one, two = method.updates()
    assert (one.trains, two.trains, two.repeat, two.shares) == (("student",), ("discriminator",), 3, 3)
    loss = method.student_loss(batch, step)["gan"]
    assert all(grad is not None and grad.any() for grad in torch.autograd.grad(loss, (student.m, student.S)))
    assert not step.kept["sample"].requires_grad
    assert not method.critic_loss(batch,
                                  problem.step(8, "discriminator", kept=step.kept))["discriminator"].requires_grad


def test_every_position_has_a_margin_of_its_own():
    """One position that is wrong teaches on beside three that are right beyond the margin; heads weigh alike, whatever
    their sizes."""
    problem = Problem(0, "flow")
    logits = [torch.tensor([[5.0, 5.0, 5.0, -1.0]]).double().requires_grad_(), torch.tensor([[0.5]]).double()]
    method, batch, step = made(problem, discriminator=lambda x, t, cond: logits), problem.batch(1), problem.step(1)
    assert method.student_loss(batch, step)["gan"].item() == pytest.approx(-(14 / 4 + 0.5) / 2)
    loss = method.critic_loss(batch, problem.step(1, "discriminator", kept=step.kept))["discriminator"]
    assert loss.item() == pytest.approx(((2 + 18) / 4 + 2) / 2)
    torch.autograd.backward(loss)
    assert logits[0].grad.tolist() == [[0.125, 0.125, 0.125, -0.125]], (
        "as real and as fake; wrong where it is real and too low")


@pytest.mark.parametrize("count, served", [(3, False), (7, False), (5, True)])
def test_a_number_of_nodes_that_lcm_scheduler_cannot_space_evenly_is_refused(count, served):
    settings = Settings(shares=(1 / count,) * count, warmup_shares=(1 / count,) * count)
    assert spelled(LADD, settings, count, "flow").call["num_inference_steps"] == count
    if served:
        assert spelled(LADD, settings, count, "vp").call["num_inference_steps"] == count
    else:
        with pytest.raises(ValueError, match=f"divides its 1000; ladd is set to {count}"):
            spelled(LADD, settings, count, "vp")
