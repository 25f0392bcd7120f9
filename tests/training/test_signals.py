"""Signals, each against its closed form."""
from __future__ import annotations

import math

import pytest
import torch

from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.exact import Gaussian
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.training import signals


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LIKE = normal(64, 2, 8, 8)


def test_samples_like_the_teachers_are_all_right():
    same = LIKE[:16].repeat(4, 1, 1, 1)                    # the same noises for every prompt, which changes nothing
    found = signals.of_samples(same, same, 4, "student")
    assert found == pytest.approx({"offset/student": 0, "spread/student": 1, "saturation/student": 0,
                                   "detail/student": 1, "diversity/student": 1}, abs=1e-9)
    prompted = LIKE + normal(4, 2, 8, 8, seed=1).repeat_interleave(16, 0)
    assert signals.of_samples(prompted, prompted, 4, "x")["following/x"] == pytest.approx(1)


def test_each_has_its_closed_form():
    shifted = LIKE + torch.tensor([3.0, 4.0], dtype=torch.float64)[:, None, None]
    deviation = (LIKE - LIKE.mean([0, 2, 3], keepdim=True)).square().mean().sqrt().item()
    assert (signals.offset(shifted, LIKE) == pytest.approx(math.sqrt(12.5) / deviation)
            and signals.spread(shifted, LIKE) == pytest.approx(1))
    assert (signals.spread(3 * LIKE, LIKE) == pytest.approx(3) and signals.diversity(0.5 * LIKE, LIKE, 4)
            == pytest.approx(0.5))
    assert signals.diversity(LIKE[::16].repeat_interleave(16, 0), LIKE, 4) == pytest.approx(0, abs=1e-9), (
        "one picture a prompt")
    assert signals.detail(LIKE.mean((2, 3), keepdim=True).expand_as(LIKE), LIKE) == pytest.approx(0, abs=1e-9)
    assert signals.change(LIKE + 1, LIKE, LIKE) == pytest.approx(1 / deviation)
    far = LIKE.clone()
    far[0] += 100
    assert signals.saturation(far, LIKE) == pytest.approx(1 / 64)


def test_following_is_the_correlation_of_prompts():
    effects = normal(4, 2, 8, 8, seed=1)
    made = lambda order: effects[order].repeat_interleave(16, 0) + LIKE[:16].repeat(4, 1, 1, 1)
    assert signals.following(made([0, 1, 2, 3]), made([0, 1, 2, 3]), 4) == pytest.approx(1)
    own = effects - effects.mean(0)
    assert (signals.following(made([1, 2, 3, 0]), made([0, 1, 2, 3]), 4)
            == pytest.approx(((own[[1, 2, 3, 0]] * own).sum() / own.square().sum()).item()))
    assert signals.following(made([0, 0, 0, 0]), made([0, 1, 2, 3]), 4) == 0, "prompts are not heard"
    assert signals.following(made([0, 1, 2, 3]), LIKE[:16].repeat(4, 1, 1, 1), 4) is None, (
        "the teacher does not hear them either")


def test_a_critic_that_is_the_posterior_mean_has_nothing_left_to_learn():
    """Of x ~ N(0, s^2) seen under noise a critic of deviation 1 errs as a scale would mend: both errors are known."""
    flow, s, n = RectifiedFlow(), 0.3, 20_000
    x, eps = s * normal(n, 1, 1, 1), normal(n, 1, 1, 1, seed=1)
    critic = lambda deviation: Gaussian(flow, torch.zeros(1, 1, 1, dtype=torch.float64),
                                        deviation**2 * torch.eye(1, dtype=torch.float64), "velocity")
    assert signals.of_critic(critic(s), flow, x, None, Condition(), eps)["unfit/critic"] == pytest.approx(0, abs=2e-3)
    expected = []
    for t in signals.LEVELS:
        alpha, sigma = 1 - t, t
        weight = alpha / (alpha**2 + sigma**2)                   # of x_t in E[x_0 | x_t] at deviation 1
        error = s**2 * (1 - weight * alpha) ** 2 + (weight * sigma) ** 2
        expected.append(1 - s**2 * sigma**2 / (alpha**2 * s**2 + sigma**2) / error)
    found = signals.of_critic(critic(1.0), flow, x, 2 * x, Condition(), eps)
    assert found["unfit/critic"] == pytest.approx(sum(expected) / 3, rel=0.02)
    assert found["lag/critic"] < 1, "held samples that it knows less well"


def test_terms():
    one, two = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    found = signals.of_terms("student", {"a": [one], "b": [two], "c": [-2 * one]})
    assert found == pytest.approx({"share/student/a": 3 / 13, "share/student/b": 4 / 13, "share/student/c": 6 / 13,
                                   "angle/student": -1})
    assert (signals.of_terms("student", {"a": [one]}) == {}
            and signals.of_terms("student", {"a": [0 * one], "b": [0 * one]}) == {})


@pytest.mark.parametrize("kind", ["logistic", "hinge"])
def test_accuracy_is_read_off_the_slopes_of_the_loss(kind):
    from stepdistill.losses.adversarial import discriminator_loss, hinge_discriminator_loss
    real, fake = (torch.tensor([[2.0], [0.5], [-0.5], [3.0]], requires_grad=True),
                  torch.tensor([[-2.0], [0.5], [-0.1], [-4.0]], requires_grad=True))
    loss = {"logistic": discriminator_loss, "hinge": hinge_discriminator_loss}[kind](real, fake).mean()
    found = signals.of_logits([real, fake], torch.autograd.grad(loss, [real, fake]))
    assert found["accuracy/discriminator"] == 6 / 8 and found["variation/discriminator"] > 1


def test_a_log_is_summed_up():
    rows = [{"step": 1, "lr": 0.1, "student/gan": 1.0, "grad_norm/student": 2.0, "skipped/student": 1.0},
            {"step": 2, "lr": 0.1, "student/gan": 3.0,
            "grad_norm/student": 0.5, "skipped/student": 0.0}, {"step": 3, "lr": 0.1, "student/gan": 9.0,
                                                                "grad_norm/student": 4.0, "skipped/student": 0.0}]
    assert signals.of_log(rows, 1.0) == pytest.approx({"loss/student/gan": 3, "grad_norm/student": 2,
                                                       "clipped/student": 2 / 3, "skipped/student": 1 / 3})
    assert signals.of_log(rows, None)["clipped/student"] == 0 and signals.of_log([], 1.0) == {}
