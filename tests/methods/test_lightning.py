from __future__ import annotations

import pytest
import torch

from stepdistill.methods.adversarial.lightning import Lightning, Settings
from stepdistill.methods.base import Frozen, Heads, Trained
from stepdistill.proofs.lightning import FunctionDiscriminator
from stepdistill.proofs.problem import FunctionRole, Problem

from .players import spelled

COUNT = 200


def made(problem, steps=2, w=1.0, discriminator=None, student=None, **settings) -> Lightning:
    """A student that believes in what it is given, and a judge that notes what it is shown."""
    settings = Settings(**{"nodes": 8, **settings})
    roles = {"teacher": problem.teacher, "student": student or FunctionRole(problem.schedule, lambda x_t, t, cond: x_t),
             "discriminator": discriminator or FunctionDiscriminator(lambda x_r, r, x_t, t, cond: x_r)}
    return Lightning(settings, roles, w, problem.sampler(Lightning.inference(settings, steps, problem.schedule)))


@pytest.mark.parametrize("settings", [{"objective": "both"}, {"nodes": 0}, {"nodes": 32, "starts": 3}, {"starts": 0},
                                      {"discriminator_times": (0.0,)},
                                      {"discriminator_times": (1.5,)}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="found"):
        Settings(**settings)


@pytest.mark.parametrize("settings, steps", [({"nodes": 32}, 3), ({"nodes": 32, "starts": 4}, 8),
                                             ({"nodes": 3}, 3), ({}, 0)])
def test_stages_that_no_stock_scheduler_samples_are_refused(settings, steps):
    with pytest.raises(ValueError, match=f"found {steps}"):
        spelled(Lightning, Settings(**settings), steps, "vp")


def test_each_objective_has_its_roles():
    needs = lambda objective: Lightning.needs(Settings(objective=objective), full=False)
    assert needs("mse") == {"teacher": Frozen(), "student": Trained("teacher")}
    assert needs("pair") == needs("mse") | {"critic": Trained("teacher"), "discriminator": Heads("critic", pair=True)}
    assert needs("single")["discriminator"] == Heads("critic")
    problem = Problem(0, "vp")
    trains = lambda objective: [update.trains for update in made(problem, objective=objective).updates()]
    assert trains("mse") == [("student",)] and trains("pair") == trains("single") == [("student",),
                                                                                      ("critic", "discriminator")]


@pytest.mark.parametrize("starts, expected",
                         [(None, {0.5: 0.0, 1.0: 0.5}), (4, {0.25: 0.0, 0.5: 0.0, 0.75: 0.25, 1.0: 0.5})])
def test_a_step_begins_at_the_student_s_times_and_lands_one_of_its_steps_below_or_on_the_data(starts, expected):
    problem = Problem(0, "flow")
    x_t, times = made(problem, starts=starts).started(problem.batch(COUNT), problem.step(COUNT))
    assert times.shape == (5, COUNT) and times.dtype == torch.float64
    assert dict(zip(times[0].tolist(), times[-1].tolist())) == expected
    steps = times.diff(dim=0).unique().tolist()
    assert steps == ([-0.125] if starts is None else [-0.125, 0.0])


@pytest.mark.parametrize("w", [1.0, 4.0])
def test_the_teacher_is_guided_the_student_and_its_judge_are_not(w):
    problem, seen = Problem(0, "vp"), []
    asked = FunctionRole(problem.schedule, lambda x_t, t, cond: cond.text)
    method = made(problem, w=w, discriminator=FunctionDiscriminator(lambda x_r, r, x_t, t, cond: seen.append(cond)
                                                                    or x_r))
    method.teacher, batch, step = asked, problem.batch(4), problem.step(4)
    method.student_loss(batch, step)
    method.critic_loss(batch, problem.step(4, kept=step.kept))
    assert [len(cond) for _, _, cond in asked.calls] == [4 if w == 1 else 8] * 4
    assert len(seen) == 3 and all(cond is batch.cond for cond in seen) and method.student.calls[0][2] is batch.cond


@pytest.mark.parametrize("noise", ["vp", "flow"])
def test_a_landing_on_the_data_is_noised_again_before_it_is_judged(noise):
    """And only there; the teacher's and the student's alike."""
    problem, seen = Problem(0, noise), []
    discriminator = FunctionDiscriminator(lambda x_r, r, x_t, t, cond: seen.append((x_r, r, x_t, t)) or x_r)
    method = made(problem, discriminator=discriminator, discriminator_times=(0.01, 0.5, 0.75))
    batch, step = problem.batch(COUNT), problem.step(COUNT)
    method.student_loss(batch, step)
    critic = problem.step(COUNT, "critic+discriminator", kept=step.kept)
    method.critic_loss(batch, critic)
    times, x_r = step.kept["times"], step.kept["x_r"]
    onto, noised = times[-1] == 0, critic.normal("judged noise", (problem.dim,))
    (real, r, x_t, t), (fake, again, *_) = seen[1:]
    assert torch.equal(r, again) and set(r[onto].tolist()) == {0.01, 0.5, 0.75} and (r[~onto] == 0.5).all()
    assert torch.equal(fake[~onto], x_r[~onto]) and torch.equal(fake[onto],
                                                                problem.schedule.add_noise(x_r, noised, r)[onto])
    clean = problem.schedule.add_noise(method.teacher_landing(x_t, times, batch, step), noised, r)
    assert torch.equal(real[onto], clean[onto]) and torch.equal(t, times[0])


def test_without_that_the_critic_is_told_the_least_time_there_is():
    problem, times = Problem(0, "vp"), []
    method = made(problem, objective="single",
                  discriminator=FunctionDiscriminator(lambda x_r, r, x_t, t, cond: times.append(r) or x_r))
    method.student_loss(problem.batch(COUNT), problem.step(COUNT))
    assert set(times[0].tolist()) == {0.001, 0.5}


def test_gradients_reach_whom_they_train_and_nobody_else():
    problem = Problem(0, "vp")
    student, batch, step = problem.affine(), problem.batch(8), problem.step(8)
    problem.teacher.covariance.requires_grad_()
    method = made(problem, student=student)
    loss = method.student_loss(batch, step)["gan"]
    assert all(grad.any() for grad in torch.autograd.grad(loss, (student.m, student.S), retain_graph=True))
    with pytest.raises(RuntimeError, match="have been used"):
        torch.autograd.grad(loss, problem.teacher.covariance)
    assert not method.critic_loss(batch, problem.step(8, kept=step.kept))["discriminator"].requires_grad
    mse = made(problem, student=student, objective="mse").regression(batch, step)["mse"]
    assert torch.autograd.grad(mse, (problem.teacher.covariance, student.S), allow_unused=True)[0] is None


@pytest.mark.parametrize("kind", ["x0", "v"])
def test_a_teacher_that_has_landed_is_asked_no_more_of_the_data(kind):
    """From the student's later times one step takes the teacher to the data early: there a network of x_0 has no
    eps."""
    problem = Problem(1, "vp")
    teacher = FunctionRole(problem.schedule, lambda x_t, t, cond: 0.5 * x_t, kind)
    method = made(problem, steps=1, starts=4)
    method.teacher = teacher
    batch, step = problem.batch(COUNT), problem.step(COUNT)
    x_t, times = method.started(batch, step)
    landed = method.teacher_landing(x_t, times, batch, step)
    assert (times[1:-1] == 0).any() and landed.isfinite().all() and all((t > 0).all() for _, t, _ in teacher.calls)
