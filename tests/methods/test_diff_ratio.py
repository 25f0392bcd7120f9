"""DiffRatio beyond its identities: the pull of a known slope, the classifier's part, what is needed and refused."""
import pytest
import torch
from torch.nn.functional import softplus

from stepdistill.diffusion.contracts import Batch
from stepdistill.methods.base import Heads, Inference, Trained
from stepdistill.methods.distribution.diff_ratio import DiffRatio, Settings

from .players import REAL_MEAN, SCHEDULES, affine, few_steps, moment, prompts

COUNT, SLOPE = 64, 0.5


def make(schedule="vp", **settings):
    student = affine(SCHEDULES[schedule][0], -0.3, 1.2)
    roles = {"student": student, "discriminator": lambda x_t, t, cond: (SLOPE * x_t).expand(-1, 3)}
    return DiffRatio(Settings(**settings), roles, 1.0, few_steps(1, schedule)), student


def noised(method, schedule: str, step, times):
    """z, x_t and t (B, 1) of a step."""
    z, t = step.normal("start", (1,)).double(), times(step.uniform("t"))
    return z, SCHEDULES[schedule][0].add_noise(-0.3 + 1.2 * z, step.normal("noise", (1,)), t), t[:, None]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weight, power", [("score", 0), ("eps", 1), ("x0", 2)])
def test_x_moves_up_the_classifiers_slope(schedule, weight, power):
    """d x = alpha (sigma / alpha)^power times the slope of the logit, whatever the noise."""
    method, student = make(schedule, weight=weight)
    step = moment(COUNT)
    method.student_loss(prompts(COUNT), step)["log_ratio"].backward()
    z, _, t = noised(method, schedule, step, method.moved)
    s = SCHEDULES[schedule][0]
    pull = -SLOPE * s.alpha(t) * (s.sigma(t) / s.alpha(t)) ** power
    assert student.m.grad.item() == pytest.approx(pull.mean().item(), rel=1e-5)
    rounding = 1e-7 * pull.abs().mean().item()                    # of float32 noises, whose pulls cancel each other
    assert student.s.grad.item() == pytest.approx((pull * z).mean().item(), rel=1e-5, abs=rounding)


@pytest.mark.parametrize("divergence, h", [("forward_kl", lambda r: r), ("js", lambda r: 2 * r / (1 + r))])
def test_a_divergence_weighs_by_the_ratio(divergence, h):
    method, student = make(weight="score", divergence=divergence)
    step = moment(COUNT)
    method.student_loss(prompts(COUNT), step)["log_ratio"].backward()
    _, x_t, t = noised(method, "vp", step, method.moved)
    pull = -h((SLOPE * x_t).exp().clamp(0.1, 20)) * SLOPE * SCHEDULES["vp"][0].alpha(t)
    assert student.m.grad.item() == pytest.approx(pull.mean().item(), rel=1e-5)


def test_the_classifier_tells_data_from_the_sample_that_the_student_was_moved_by():
    method, student = make()
    batch = Batch(torch.arange(COUNT), prompts(COUNT).cond, torch.full((COUNT, 1), REAL_MEAN, dtype=torch.float64))
    first, step = moment(COUNT), moment(COUNT, "critic+discriminator")
    method.student_loss(batch, first)
    step = moment(COUNT, "critic+discriminator")
    step.kept.update(first.kept)
    found = method.critic_loss(batch, step)["discriminator"].item()
    t, eps, s = method.trained(step.uniform("t")), step.normal("noise", (1,)), SCHEDULES["vp"][0]
    x = -0.3 + 1.2 * first.normal("start", (1,)).double()
    real, fake = (SLOPE * s.add_noise(clean, eps, t) for clean in (batch.x0, x))
    assert found == pytest.approx((softplus(-real) + softplus(fake)).mean().item(), rel=1e-6)
    assert len(student.given) == 1 and not first.kept["sample"].requires_grad


def test_no_teacher_is_asked_and_no_critic_denoises():
    assert DiffRatio.needs(Settings(), full=True) == {
        "student": Trained("teacher"), "critic": Trained("teacher"), "discriminator": Heads("critic")}
    assert "prompts" not in DiffRatio.data and make()[0].denoiser is None
    assert DiffRatio.inference(Settings(start_time=0.4), 1, SCHEDULES["vp"][0]) == Inference(1, noise=1.0, times=(0.4,))
    student, critic = make(critic_steps=3)[0].updates()
    assert (student.trains, critic.trains, critic.repeat, critic.shares) == (("student",), ("critic", "discriminator"),
                                                                             3, 1)


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"t_range": (0.5, 0.5)}, {"divergence": "kl"},
                                     {"weight": "v"}, {"t_range": (0.0, 1.0)}, {"start_time": 0.0}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must"):
        Settings(**changes)
    assert Settings(weight="score", t_range=(0.0, 1.0)).weight == "score"
