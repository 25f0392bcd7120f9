from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from stepdistill.diffusion.contracts import Batch, Condition
from stepdistill.diffusion.draws import Step
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import Schedule, like
from stepdistill.diffusion.weighting import dmd
from stepdistill.losses.matching import distribution_matching
from stepdistill.methods.base import Heads
from stepdistill.methods.distribution.dmd2 import DMD2, Settings

from .closed import predict
from .players import REAL_MEAN, REAL_VARIANCE, SCHEDULES, affine, few_steps, gaussian, moment, prompts

PLAIN = Settings(gan_weight=0)
COUNT = 64


@dataclass
class Linear:
    """Logits c x_t + t, and the critic's prediction of the same pass. It counts its whole and its partial passes."""

    critic: object
    c: Tensor
    passes: list[str] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        self.passes.append("features")
        return self.c * x_t + t[:, None]

    def with_prediction(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> tuple[Prediction, Tensor]:
        self.passes.append("whole")
        return self.critic(x_t, t, cond), self.c * x_t + t[:, None]


def make(schedule="vp", settings=PLAIN, guidance=1.0, steps=1, student=None, critic=None, teacher=None, gan=None):
    s, kind = SCHEDULES[schedule]
    student = student or affine(s, -0.3, 1.2)
    roles = {"teacher": teacher or gaussian(s, REAL_MEAN, REAL_VARIANCE, kind), "student": student,
             "critic": critic or gaussian(s, -0.3, 1.44, kind)}
    if gan is not None:
        roles["discriminator"] = Linear(roles["critic"], gan)
    return DMD2(settings, roles, guidance, few_steps(steps, schedule)), roles


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_is_the_normalised_difference_of_the_scores(schedule):
    """In every sample: (fake - real) / |x - real|, of denoisers m + alpha v (x_t - alpha m) / (alpha^2 v + sigma^2)."""
    method, roles = make(schedule)
    s, student, step = SCHEDULES[schedule][0], roles["student"], moment(COUNT)
    method.student_loss(prompts(COUNT), step)["matching"].backward()
    z = step.normal("start", (1,)).double()
    x = (-0.3 + 1.2 * z).detach()
    t = method.matched(step.uniform("t"))
    x_t = s.add_noise(x, step.normal("noise", (1,)), t)
    alpha, sigma = like(s.alpha(t), x), like(s.sigma(t), x)
    denoised = lambda m, v: m + alpha * v * (x_t - alpha * m) / (alpha**2 * v + sigma**2)
    real, fake = denoised(REAL_MEAN, REAL_VARIANCE), denoised(-0.3, 1.44)
    gradient = (fake - real) / (x - real).abs()
    assert student.m.grad.item() == pytest.approx(gradient.mean().item(), rel=1e-4)
    assert student.s.grad.item() == pytest.approx((gradient * z).mean().item(), rel=1e-4)


def test_the_gradient_does_not_change_with_the_scale_of_the_latents():
    """Twice the data, twice the sample: the difference doubles, and so does what it is divided by."""
    found = []
    for scale in (1.0, 2.0):
        x = torch.full((COUNT, 1), 0.4 * scale, dtype=torch.float64, requires_grad=True)
        real, fake = torch.full_like(x, 0.9 * scale), torch.full_like(x, 0.2 * scale)
        distribution_matching(x, real, fake, dmd(x.detach(), real)).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_student_of_the_teacher_s_law_is_left_alone(schedule):
    s, kind = SCHEDULES[schedule]
    student = affine(s, REAL_MEAN, REAL_VARIANCE**0.5)
    method, _ = make(schedule, student=student, critic=gaussian(s, REAL_MEAN, REAL_VARIANCE, kind))
    method.student_loss(prompts(COUNT), moment(COUNT))["matching"].backward()
    assert student.m.grad == 0 and student.s.grad == 0


@dataclass
class Conditional:
    """N(text, v): cond.text is the mean."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        alpha, sigma = like(self.schedule.alpha(t), x_t), like(self.schedule.sigma(t), x_t)
        x0 = cond.text + alpha * REAL_VARIANCE * (x_t - alpha * cond.text) / (alpha**2 * REAL_VARIANCE + sigma**2)
        return predict(x0, x_t, t, self.schedule, "v")


@pytest.mark.parametrize("w, at_rest", [(1.0, 0.8), (3.0, -0.2 + 3 * (0.8 + 0.2))])
def test_guidance_moves_the_fixed_point_and_is_the_teacher_s_alone(w, at_rest):
    """Denoisers of one variance mix into that of the mixed mean: a student there, with its own critic, is at rest."""
    s, kind = SCHEDULES["vp"]
    text = torch.full((COUNT, 1), 0.8, dtype=torch.float64)
    batch = Batch(torch.arange(COUNT), Condition(text=text, null=Condition(text=torch.full_like(text, -0.2))),
                  shape=(1,))
    for mean, moves in ((at_rest, False), (at_rest + 0.5, True)):
        student = affine(s, mean, REAL_VARIANCE**0.5)
        method, _ = make(student=student, teacher=Conditional(s), guidance=w,
                         critic=gaussian(s, mean, REAL_VARIANCE, kind))
        method.student_loss(batch, moment(COUNT))["matching"].backward()
        assert (student.m.grad.item() > 0.1) == moves and (moves or abs(student.m.grad.item()) < 1e-5)


def test_the_critic_learns_the_student_s_law():
    """Fitted by the loss to samples of N(-0.3, 1.44), an affine denoiser a x_t + b at each level finds the posterior
    mean."""
    s, kind = SCHEDULES["flow"]
    mean = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    variance = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def critic(x_t, t, cond=None):
        alpha, sigma = like(s.alpha(t), x_t), like(s.sigma(t), x_t)
        x0 = mean + alpha * variance * (x_t - alpha * mean) / (alpha**2 * variance + sigma**2)
        return predict(x0, x_t, t, s, "velocity")
    critic.schedule = s
    method, _ = make("flow", critic=critic)
    optimizer = torch.optim.Adam([mean, variance], lr=0.03)
    for i in range(150):
        optimizer.zero_grad()
        method.critic_loss(prompts(512), moment(512, "critic", index=i))["denoising"].backward()
        optimizer.step()
    assert mean.item() == pytest.approx(-0.3, abs=0.06) and variance.item() == pytest.approx(1.44, abs=0.15)


def test_exits_are_uniform_and_the_first_input_is_noise():
    s = SCHEDULES["vp"][0]
    asked = Counter()

    class Student:
        schedule = s

        def __call__(self, x_t, t, cond=None):
            self.last, self.x_t = round(t[0].item() * 1000) - 1, x_t
            return predict(0.5 * x_t, x_t, t, s, "x0")

    student = Student()
    method, _ = make(steps=4, student=student)
    for index in range(200):
        step = moment(2, index=index)
        method.student_loss(prompts(2), step)
        asked[student.last] += 1
        if student.last == 999:
            torch.testing.assert_close(student.x_t, step.normal("start", (1,)))
    assert asked.keys() == {999, 749, 499, 249} and min(asked.values()) > 30


def test_the_student_never_sees_the_data():
    """With pictures for the discriminator or without: the same noise, the same samples."""
    given = []
    for x0 in (None, torch.full((COUNT, 1), 5.0, dtype=torch.float64)):
        method, roles = make()
        batch = Batch(torch.arange(COUNT), prompts(COUNT).cond, x0, (1,))
        method.student_loss(batch, moment(COUNT))
        method.critic_loss(batch, moment(COUNT, "critic"))
        given.append(torch.cat(roles["student"].given))
    torch.testing.assert_close(given[0], given[1], rtol=0, atol=0)


def test_gradients_flow_through_the_last_evaluation_alone():
    s = SCHEDULES["vp"][0]
    weights = torch.ones(4, dtype=torch.float64, requires_grad=True)        # one for each of the sampler's times

    def student(x_t, t, cond=None):
        return predict(weights[round(t[0].item() * 4) - 1] * 0.5 * x_t, x_t, t, s, "x0")
    student.schedule = s
    method, _ = make(steps=4, student=student)
    for index in range(12):
        weights.grad = None
        step = moment(4, index=index)
        method.student_loss(prompts(4), step)["matching"].backward()
        assert weights.grad.nonzero().flatten().tolist() == [3 - int(step.shared("exit") * 4)]


def test_a_critic_may_be_told_the_exit_of_the_very_sample_that_it_is_shown():
    s, kind = SCHEDULES["vp"]
    scales: list[float] = []

    def listening(x_t, t, cond):
        scales.extend(cond.w.unique().tolist())
        return gaussian(s, -0.3, 1.44, kind)(x_t, t)
    listening.schedule = s
    student = lambda x_t, t, cond=None: predict(0.5 * x_t, x_t, t, s, "x0")
    method, _ = make(settings=Settings(gan_weight=0, exit_embedding=True), steps=4, student=student, critic=listening)
    assert method.needs(method.settings, False)["critic"].reads and not method.needs(PLAIN, False)["critic"].reads
    exit_of = lambda step: 1 + int(step.shared("exit") * 4)
    for index in range(12):
        step, own = moment(4, index=index), moment(4, "critic", repeat=1, index=index)
        method.student_loss(prompts(4), step)
        method.critic_loss(prompts(4), Step(0, index, 0.0, "critic", 0, torch.arange(4), kept=step.kept))
        method.critic_loss(prompts(4), own)
        assert scales == [exit_of(step), exit_of(step), exit_of(own)]
        scales.clear()


# -- the discriminator -------------------------------------------------------------------------------------------------

GAN = Settings(gan_weight=0.5, critic_gan_weight=2.0)


def pictures(count: int = COUNT) -> Batch:
    return Batch(torch.arange(count), prompts(count).cond, torch.full((count, 1), REAL_MEAN, dtype=torch.float64))


def test_the_student_is_drawn_to_what_the_discriminator_calls_real():
    """d/dx softplus(-(c x_t + t)) = -sigmoid(-logit) c alpha_t, beside the matching gradient, which does not change."""
    s, c = SCHEDULES["vp"][0], torch.tensor(0.8, dtype=torch.float64)
    method, roles = make(settings=GAN, gan=c)
    plain, alone = make()
    step = moment(COUNT)
    losses = method.student_loss(pictures(), step)
    expected = plain.student_loss(pictures(), moment(COUNT))["matching"]
    assert losses["matching"].item() == pytest.approx(expected.item(), rel=1e-12)
    losses["gan"].backward()
    t = method.matched(step.uniform("t"))
    x_t = s.add_noise(-0.3 + 1.2 * step.normal("start", (1,)).double(), step.normal("noise", (1,)), t)
    pull = -0.5 * torch.sigmoid(-(c * x_t + t[:, None])) * c * like(s.alpha(t), x_t)
    assert roles["student"].m.grad.item() == pytest.approx(pull.mean().item(), rel=1e-4)
    assert roles["discriminator"].passes == ["whole"], "one pass of the critic serves both"


def test_the_discriminator_tells_noised_real_from_noised_fake():
    s, c = SCHEDULES["vp"][0], torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    method, roles = make(settings=GAN, gan=c)
    step = moment(COUNT, "critic")
    losses = method.critic_loss(pictures(), step)
    t, real_t = method.trained(step.uniform("t")), method.trained(step.uniform("real t"))
    fake = s.add_noise(-0.3 + 1.2 * step.normal("start", (1,)).double(), step.normal("noise", (1,)), t)
    real = s.add_noise(pictures().x0, step.normal("real noise", (1,)), real_t)
    separation = softplus(-(c * real + real_t[:, None])) + softplus(c * fake + t[:, None])
    assert losses["discriminator"].item() == pytest.approx(2.0 * separation.mean().item(), rel=1e-5)
    assert roles["discriminator"].passes == ["whole", "features"]
    assert all(p.grad is None for p in (roles["student"].m, roles["student"].s))


def test_who_is_needed_and_what_for():
    assert DMD2.needs(GAN, full=False)["discriminator"] == Heads("critic")
    assert "discriminator" not in DMD2.needs(PLAIN, full=False)
    assert "gan_weight is 0.5, and the discriminator is shown real images" in DMD2.refusal(GAN, "prompts")
    assert DMD2.refusal(PLAIN, "prompts") is DMD2.refusal(GAN, "images") is None
    student, critic = make(settings=Settings(gan_weight=0, critic_steps=3))[0].updates()
    assert (student.trains, critic.trains, critic.repeat, critic.shares) == (("student",), ("critic",), 3, 1)
    every = make(settings=Settings(critic_steps=3, share_rollout=True), gan=torch.tensor(1.0))[0].updates()[1]
    assert (every.trains, every.shares) == (("critic", "discriminator"), 3)


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"t_range": (0.5, 0.5)}, {"t_range": (0.0, 1.2)},
                                     {"gan_weight": -1.0}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must"):
        Settings(**changes)
