"""Chains in closed form: where a student ends that follows them, what of their noise is left, and what they cost."""
from __future__ import annotations

import pytest
import torch

from stepdistill.methods.base import Frozen, Trained
from stepdistill.methods.hybrid.em_distillation import EMDistillation, Settings

from .players import REAL_MEAN, REAL_VARIANCE, SCHEDULES, affine, few_steps, gaussian, moment, prompts

COUNT, MEAN, DEVIATION = 4000, -0.3, 1.2


def make(schedule="vp", mean=MEAN, deviation=DEVIATION, **settings):
    s, kind = SCHEDULES[schedule]
    roles = {"teacher": gaussian(s, REAL_MEAN, REAL_VARIANCE, kind), "student": affine(s, mean, deviation),
             "critic": gaussian(s, mean, deviation**2, kind)}
    return EMDistillation(Settings(**settings), roles, 1.0, few_steps(1, schedule)), roles


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_at_rest_is_the_difference_of_the_scores(schedule):
    method, roles = make(schedule, langevin_steps=1, latent_rate=0.0)
    step = moment(64)
    method.student_loss(prompts(64), step)["matching"].backward()
    z, t = step.normal("start", (1,)).double(), method.matched(step.uniform("t"))
    x = MEAN + DEVIATION * z
    x_t = SCHEDULES[schedule][0].add_noise(x, step.normal("noise", (1,)), t)
    real, fake = roles["teacher"](x_t, t).x0, roles["critic"](x_t, t).x0
    pull = (fake - real) / (x - real).abs()
    assert roles["student"].m.grad.item() == pytest.approx(pull.mean().item(), rel=1e-5)
    assert roles["student"].s.grad.item() == pytest.approx((pull * z).mean().item(), rel=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_student_of_the_teacher_s_law_has_no_drift_and_its_latents_stay_normal(schedule):
    """z <- (1 - u) z + sqrt(2 u) n keeps a variance of 1 but for u^2 a step."""
    method, _ = make(schedule, REAL_MEAN, REAL_VARIANCE**0.5, langevin_steps=20, latent_rate=0.05)
    z, drift, _ = method.chain(prompts(COUNT), moment(COUNT), torch.full((COUNT,), 0.5, dtype=torch.float64))
    assert drift.abs().max() < 1e-5 and z.mean().item() == pytest.approx(0, abs=0.06)
    assert z.var().item() == pytest.approx(1 + 0.05**2 * sum(0.95 ** (2 * i) for i in range(20)), rel=0.08)


def test_long_chains_of_one_latent_reach_the_tilted_law():
    """At fixed z, E eps of the law e^(-eps^2 / 2) p / q solves eps = sigma (score p - score q) at alpha x + sigma
    eps."""
    method, roles = make(langevin_steps=60, noise_rate=0.1, latent_rate=0.0)
    t = torch.full((COUNT,), 0.3, dtype=torch.float64)
    step, s = moment(COUNT), SCHEDULES["vp"][0]
    z, drift, _ = method.chain(prompts(COUNT), step, t)
    alpha, sigma = s.alpha(t[:1]).item(), s.sigma(t[:1]).item()
    x, eps = MEAN + DEVIATION * z.double(), torch.zeros(COUNT, 1, dtype=torch.float64)
    for _ in range(200):
        x_t = alpha * x + sigma * eps
        eps = 0.9 * eps + 0.1 * alpha / sigma * (roles["teacher"](x_t, t).x0 - roles["critic"](x_t, t).x0)
    left = (drift - sigma / alpha * eps)
    assert left.mean().abs().item() < 6 * left.std().item() / COUNT**0.5


@pytest.mark.parametrize("rate, asked", [(0.0, 3 + 1), (1e-4, 3 + 1)])
def test_a_chain_asks_teacher_and_critic_once_a_step(rate, asked):
    method, roles = make(langevin_steps=3, latent_rate=rate)
    method.student_loss(prompts(8), moment(8))["matching"].backward()
    assert len(roles["student"].given) == asked


def test_who_is_needed_and_what_is_refused():
    needs = {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")}
    assert EMDistillation.needs(Settings(), full=False) == needs and "prompts" in EMDistillation.data
    student, critic = make(critic_steps=3)[0].updates()
    assert (student.trains, critic.trains, critic.repeat) == (("student",), ("critic",), 3)
    with pytest.raises(ValueError, match="makes one-step students, found 2 steps"):
        EMDistillation.inference(Settings(), 2, SCHEDULES["vp"][0])


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"t_range": (0.5, 0.5)}, {"langevin_steps": 0},
                                     {"noise_rate": 0.0}, {"noise_rate": 1.1},
                                     {"latent_rate": -0.1}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must"):
        Settings(**changes)
