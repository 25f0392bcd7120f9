"""The step of a share, what its heads regress, and SMT, whose critic reads the share."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.contracts import Batch
from stepdistill.diffusion.prediction import Prediction
from stepdistill.methods.base import Heads, Trained
from stepdistill.methods.distribution.smd import SMD, Settings

from .players import REAL_MEAN, REAL_VARIANCE, SCHEDULES, affine, few_steps, gaussian, moment, prompts

COUNT, MEAN, DEVIATION, SLOPE = 64, -0.3, 1.2, 0.5
TEACHER, DATA = Settings(), Settings(source="data")


def make(schedule="vp", settings=TEACHER, critic=None):
    s, kind = SCHEDULES[schedule]
    roles = {"student": affine(s, MEAN, DEVIATION), "critic": critic or gaussian(s, MEAN, DEVIATION**2, kind)}
    if settings.source == "teacher":
        roles |= {"teacher": gaussian(s, REAL_MEAN, REAL_VARIANCE, kind),
                  "discriminator": lambda x_t, t, cond: (SLOPE * x_t).expand(-1, 3)}
    return SMD(settings, roles, 1.0, few_steps(1, schedule)), roles


def sampled(method, schedule: str, step, times):
    """z, x, x_t and t of a step."""
    z, t = step.normal("start", (1,)).double(), times(step.uniform("t"))
    x = MEAN + DEVIATION * z
    return z, x, SCHEDULES[schedule][0].add_noise(x, step.normal("noise", (1,)), t), t


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shares", [(0.5, 1.0), (1.0, 1.0), (0.0, 0.0)])
def test_each_sample_is_pulled_by_its_share(schedule, shares):
    method, roles = make(schedule, Settings(shares=shares, gan_weight=0))
    step = moment(COUNT)
    losses = method.student_loss(prompts(COUNT), step)
    losses["matching"].backward()
    z, x, x_t, t = sampled(method, schedule, step, method.matched)
    a, r = (shares[0] + (shares[1] - shares[0]) * step.uniform("share"))[:, None], (SLOPE * x_t).exp().clamp(0.1, 20)
    real, fake = roles["teacher"](x_t, t).x0, roles["critic"](x_t, t).x0
    pull = r / (a * r + 1 - a) * (fake - real) / (x - real).abs()
    assert list(losses) == ["matching"]
    assert roles["student"].m.grad.item() == pytest.approx(pull.mean().item(), rel=1e-5)
    assert roles["student"].s.grad.item() == pytest.approx((pull * z).mean().item(), rel=1e-5)


def test_being_taken_for_the_teachers_part_of_the_mixture():
    """-log of a r / (a r + 1 - a), and nothing at a = 1."""
    method, _ = make(settings=Settings(gan_weight=0.5))
    step = moment(COUNT)
    found = method.student_loss(prompts(COUNT), step)["gan"].item()
    _, _, x_t, _ = sampled(method, "vp", step, method.matched)
    a, r = (0.5 + 0.5 * step.uniform("share"))[:, None], (SLOPE * x_t).exp()
    assert found == pytest.approx(-0.5 * (a * r / (a * r + 1 - a)).log().mean().item(), rel=1e-5)
    whole = make(settings=Settings(gan_weight=0.5, shares=(1.0, 1.0)))[0].student_loss(prompts(COUNT), moment(COUNT))
    assert whole["gan"].item() == 0 and torch.isfinite(whole["matching"])


def data() -> Batch:
    return Batch(torch.arange(COUNT), prompts(COUNT).cond, torch.full((COUNT, 1), REAL_MEAN, dtype=torch.float64))


def test_heads_regress_the_mixtures_score():
    """(1 - a) |f_a - fake|^2 at noised samples and a |f_a - real|^2 at noised data, in v, f_a = D real + (1 - D)
    fake."""
    method, roles = make()
    step, s = moment(COUNT, "critic+discriminator"), SCHEDULES["vp"][0]
    found = method.critic_loss(data(), step)["mixture"].item()
    _, _, x_t, t = sampled(method, "vp", step, method.trained)
    data_t = s.add_noise(data().x0, step.normal("noise", (1,)), t)
    a = torch.where(step.uniform("none") < 0.25, 0.0, step.uniform("share"))[:, None]
    known = torch.zeros(())
    for y, weight, end in ((x_t, 1 - a, "critic"), (data_t, a, "teacher")):
        r = (SLOPE * y).exp()
        D, real, fake = a * r / (a * r + 1 - a), roles["teacher"](y, t).v, roles["critic"](y, t).v
        known = known + (weight * (D * real + (1 - D) * fake - roles[end](y, t).v) ** 2).mean()
    assert found == pytest.approx(known.item(), rel=1e-5)


class Reader:
    """A critic whose x_0 is its share times c."""

    def __init__(self, c: float) -> None:
        self.schedule, self.c, self.read = (SCHEDULES["vp"][0],
                                            torch.tensor(c, dtype=torch.float64, requires_grad=True), [])

    def __call__(self, x_t: Tensor, t: Tensor, cond) -> Prediction:
        self.read.append(cond.extra["share"])
        return Prediction((self.c * cond.extra["share"])[:, None].expand(len(t), 1) + 0 * x_t, x_t, t,
                          self.schedule, "x0")


def test_smt_moves_by_what_a_critic_says_of_a_share_as_far_as_at_1():
    """Of a critic that says c a the difference is c a, made c; over |x - c|."""
    method, roles = make(settings=DATA, critic=Reader(0.8))
    step = moment(COUNT)
    method.learned_loss(prompts(COUNT), step)["matching"].backward()
    z = step.normal("start", (1,)).double()
    pull = -0.8 / (MEAN + DEVIATION * z - 0.8).abs()
    assert roles["student"].m.grad.item() == pytest.approx(pull.mean().item(), rel=1e-4)
    zero, share, one = roles["critic"].read
    assert (zero == 0).all() and (one == 1).all() and torch.equal(share, 0.5 + 0.5 * step.uniform("share"))
    assert roles["critic"].c.grad is None


def test_smt_trains_its_critic_on_both_parts_of_each_mixture():
    method, roles = make(settings=DATA, critic=Reader(0.8))
    step = moment(COUNT, "critic")
    found = method.mixed_loss(data(), step)["denoising"]
    a = torch.where(step.uniform("none") < 0.25, 0.0, step.uniform("share"))[:, None]
    x = MEAN + DEVIATION * step.normal("start", (1,)).double()
    known = ((1 - a) * (0.8 * a - x) ** 2 + a * (0.8 * a - REAL_MEAN) ** 2).mean()
    assert found.item() == pytest.approx(known.item(), rel=1e-5) and roles["student"].m.grad is None


def test_who_is_needed():
    assert SMD.needs(Settings(), full=False)["discriminator"] == Heads("teacher") and "prompts" not in SMD.data
    assert SMD.needs(DATA, full=True) == {"student": Trained("teacher"), "critic": Trained("teacher", reads=("share",))}
    for settings, trains in ((Settings(critic_steps=3), ("critic", "discriminator")),
                             (Settings(source="data", critic_steps=3), ("critic",))):
        student, critic = make(settings=settings)[0].updates()
        assert (student.trains, critic.trains, critic.repeat) == (("student",), trains, 3)


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"t_range": (0.5, 0.5)}, {"gan_weight": -1.0},
                                     {"source": "images"}, {"source": "data", "gan_weight": 0.1},
                                     {"shares": (0.6, 0.5)}, {"shares": (0.5, 1.1)}, {"none": 1.0}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must"):
        Settings(**changes)
