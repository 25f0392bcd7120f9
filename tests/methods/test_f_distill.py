"""With an exact critic and the exact log ratio, the step is the gradient of the divergence between two Gaussians."""
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.contracts import Batch
from stepdistill.diffusion.schedule import like
from stepdistill.losses.divergence import DIVERGENCES
from stepdistill.methods.base import Heads
from stepdistill.methods.distribution.f_distill import FDistill, Settings

from .players import REAL_MEAN, REAL_VARIANCE, SCHEDULES, affine, few_steps, gaussian, moment, prompts

COUNT = 64
PLAIN = Settings(gan_weight=0)
MEAN, DEVIATION = -0.3, 1.2


def make(schedule="vp", settings=PLAIN, logits=None, student=None):
    s, kind = SCHEDULES[schedule]
    teacher, critic = gaussian(s, REAL_MEAN, REAL_VARIANCE, kind), gaussian(s, MEAN, DEVIATION**2, kind)
    asked = []

    def discriminator(x_t: Tensor, t: Tensor, cond=None) -> Tensor:
        asked.append(t)
        return (exact(s, x_t, t) if logits is None else logits(x_t, t)).expand(-1, 3)          # three heads
    roles = {"teacher": teacher, "student": student or affine(s, MEAN, DEVIATION), "critic": critic,
             "discriminator": discriminator}
    return FDistill(settings, roles, 1.0, few_steps(1, schedule)), roles, asked


def exact(s, x_t: Tensor, t: Tensor) -> Tensor:
    """log p(x_t) - log q(x_t)."""
    def density(mean: float, variance: float) -> Tensor:
        alpha, sigma = like(s.alpha(t), x_t), like(s.sigma(t), x_t)
        spread = alpha**2 * variance + sigma**2
        return -0.5 * ((x_t - alpha * mean) ** 2 / spread + spread.log())
    return density(REAL_MEAN, REAL_VARIANCE) - density(MEAN, DEVIATION**2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_sample_is_pulled_by_its_ratio(schedule, name):
    method, roles, asked = make(schedule, replace(PLAIN, divergence=name))
    s, student, step = SCHEDULES[schedule][0], roles["student"], moment(COUNT)
    losses = method.student_loss(prompts(COUNT), step)
    losses["matching"].backward()
    z = step.normal("start", (1,)).double()
    x, t = (MEAN + DEVIATION * z).detach(), method.matched(step.uniform("t"))
    x_t = s.add_noise(x, step.normal("noise", (1,)), t)
    r = exact(s, x_t, t).exp().clamp(0.1, 20)
    h = {"reverse_kl": r**0, "forward_kl": r, "js": 2 * r / (1 + r), "softened_rkl": 2 / (1 + r), "hellinger": r.sqrt(),
         "jeffreys": (1 + r) / 2}
    real, fake = roles["teacher"](x_t, t).x0, roles["critic"](x_t, t).x0
    pull = h[name] * (fake - real) / (x - real).abs()
    assert list(losses) == ["matching"] and torch.equal(asked[0], t)
    assert student.m.grad.item() == pytest.approx(pull.mean().item(), rel=1e-5)
    assert student.s.grad.item() == pytest.approx((pull * z).mean().item(), rel=1e-5)


def test_the_ratio_holds_no_gradient_and_fooling_takes_its_own_way():
    """d/dx softplus(-c x_t) = -sigmoid(-c x_t) c alpha_t, whatever the divergence's weight."""
    c = torch.tensor(0.8, dtype=torch.float64)
    grads = {}
    for weight in (0.0, 0.5):
        method, roles, _ = make(settings=Settings(gan_weight=weight), logits=lambda x_t, t: c * x_t)
        step = moment(COUNT)
        sum(method.student_loss(prompts(COUNT), step).values()).backward()
        grads[weight] = roles["student"].m.grad.item()
    s, t = SCHEDULES["vp"][0], method.matched(step.uniform("t"))
    x_t = s.add_noise(MEAN + DEVIATION * step.normal("start", (1,)).double(), step.normal("noise", (1,)), t)
    pull = -0.5 * torch.sigmoid(-c * x_t) * c * like(s.alpha(t), x_t)
    assert grads[0.5] - grads[0.0] == pytest.approx(pull.mean().item(), rel=1e-4)


def test_the_discriminator_tells_noised_real_from_noised_fake():
    c = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    method, roles, asked = make(logits=lambda x_t, t: c * x_t)
    step = moment(COUNT, "critic")
    batch = Batch(torch.arange(COUNT), prompts(COUNT).cond, torch.full((COUNT, 1), REAL_MEAN, dtype=torch.float64))
    losses = method.critic_loss(batch, step)
    s, (t, real_t) = SCHEDULES["vp"][0], (method.trained(step.uniform(name)) for name in ("t", "real t"))
    fake = s.add_noise(MEAN + DEVIATION * step.normal("start", (1,)).double(), step.normal("noise", (1,)), t)
    real = s.add_noise(batch.x0, step.normal("real noise", (1,)), real_t)
    softplus = torch.nn.functional.softplus
    assert losses["discriminator"].item() == pytest.approx((softplus(-c * real) + softplus(c * fake)).mean().item(),
                                                           rel=1e-5)
    assert (roles["student"].m.grad is None and [torch.equal(*pair) for pair in zip(asked, (real_t, t), strict=True)]
            == [True, True])


def test_who_is_needed_and_what_for():
    assert FDistill.needs(PLAIN, full=False)["discriminator"] == Heads("teacher") and "prompts" not in FDistill.data
    student, both = make(settings=Settings(critic_steps=3, share_rollout=True))[0].updates()
    assert (student.trains, both.trains, both.repeat, both.shares) == (("student",), ("critic", "discriminator"), 3, 3)


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"t_range": (0.5, 0.5)}, {"gan_weight": -1.0},
                                     {"divergence": "kl"}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must"):
        Settings(**changes)
