"""Each sample's loss is the score identity at an alpha and a weight of its own, by the ratio that the heads tell."""
from __future__ import annotations

from dataclasses import dataclass, replace
from math import log

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.contracts import Batch
from stepdistill.diffusion.schedule import like
from stepdistill.losses.divergence import DIVERGENCES
from stepdistill.methods.base import Heads
from stepdistill.methods.distribution.uni_instruct import Settings, UniInstruct

from .players import REAL_MEAN, REAL_VARIANCE, SCHEDULES, affine, few_steps, gaussian, moment, prompts

COUNT, MEAN, DEVIATION = 64, -0.3, 1.2
PLAIN = Settings(gan_weight=0, ratio_start=0)


@dataclass
class Judge:
    """Heads beside the critic: slope x_t, three of them."""

    critic: object
    slope: Tensor

    def __call__(self, x_t, t, cond):
        return self.with_prediction(x_t, t, cond)[1]

    def with_prediction(self, x_t, t, cond):
        return self.critic(x_t, t, cond), (self.slope * x_t).expand(-1, 3)


def make(schedule="vp", settings=PLAIN, slope=0.5):
    s, kind = SCHEDULES[schedule]
    teacher, critic = gaussian(s, REAL_MEAN, REAL_VARIANCE, kind), gaussian(s, MEAN, DEVIATION**2, kind)
    roles = {"teacher": teacher, "student": affine(s, MEAN, DEVIATION), "critic": critic,
             "discriminator": Judge(critic, torch.tensor(slope, dtype=torch.float64, requires_grad=True))}
    return UniInstruct(settings, roles, 1.0, few_steps(1, schedule)), roles


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_of_each_divergence(schedule, name):
    """h / h(1) [(1 - e) / 2 d^2 + d (fake - x)] / |x - real|, e = r h' / h by a central difference."""
    method, roles = make(schedule, replace(PLAIN, divergence=name))
    step, (_, h, _) = moment(COUNT), DIVERGENCES[name]
    found = method.student_loss(prompts(COUNT), step)
    s, t = SCHEDULES[schedule][0], method.level(step.uniform("t"))
    x = (MEAN + DEVIATION * step.normal("start", (1,)).double()).detach()
    x_t = s.add_noise(x, step.normal("noise", (1,)), t)
    real, fake = roles["teacher"](x_t, t).x0, roles["critic"](x_t, t).x0
    r = (0.5 * x_t).exp().clamp(0.1, 20)
    e = (h(r * 1.0001).log() - h(r / 1.0001).log()) / (2 * log(1.0001))
    d = real - fake
    known = h(r) / h(torch.ones(1)) * ((1 - e) / 2 * d**2 + d * (fake - x)) / (x - real).abs()
    assert list(found) == ["identity"] and found["identity"].item() == pytest.approx(known.mean().item(), rel=1e-4)


def test_until_the_ratio_is_read_it_counts_as_1():
    """JS at r = 1: h / h(1) = 1 and e = 1 / 2."""
    early, late = make(settings=Settings(gan_weight=0, ratio_start=5)), make(slope=0.0)
    losses = [method.student_loss(prompts(COUNT), moment(COUNT, index=4))["identity"].item()
              for method, _ in (early, late)]
    assert losses[0] == losses[1] != early[0].student_loss(prompts(COUNT), moment(COUNT, index=5))["identity"].item()


def test_heads_tell_data_from_samples_under_one_noise():
    method, roles = make(settings=Settings(critic_gan_weight=0.4))
    step = moment(COUNT, "critic+discriminator")
    data = torch.full((COUNT, 1), REAL_MEAN, dtype=torch.float64)
    losses = method.critic_loss(Batch(torch.arange(COUNT), prompts(COUNT).cond, data), step)
    s, t, eps = SCHEDULES["vp"][0], method.level(step.uniform("t")), step.normal("noise", (1,))
    fake = s.add_noise(MEAN + DEVIATION * step.normal("start", (1,)).double(), eps, t)
    real = like(s.alpha(t), data) * data + like(s.sigma(t), data) * eps
    softplus = torch.nn.functional.softplus
    known = 0.4 * (softplus(-0.5 * real) + softplus(0.5 * fake)).mean()
    assert losses["discriminator"].item() == pytest.approx(known.item(), rel=1e-5)
    assert roles["student"].m.grad is None


def test_who_is_needed_and_in_which_order():
    assert (UniInstruct.needs(PLAIN, full=False)["discriminator"] == Heads("critic")
            and "prompts" not in UniInstruct.data)
    both, student = make(settings=Settings(critic_steps=3))[0].updates()
    assert (both.trains, both.repeat, student.trains) == (("critic", "discriminator"), 3, ("student",))


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"t_range": (0.5, 0.5)}, {"gan_weight": -1.0},
                                     {"divergence": "kl"}, {"ratio_start": -1}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must"):
        Settings(**changes)
