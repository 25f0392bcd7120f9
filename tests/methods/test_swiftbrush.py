import pytest
import torch

from stepdistill.diffusion.contracts import Batch, Condition
from stepdistill.diffusion.schedule import like
from stepdistill.methods.distribution.swiftbrush import Settings, SwiftBrush

from .closed import predict
from .players import REAL_MEAN, REAL_VARIANCE, SCHEDULES, affine, few_steps, gaussian, moment, prompts, spelled

COUNT = 64


def make(student, critic, guidance=1.0, teacher=None, **settings) -> SwiftBrush:
    s, kind = SCHEDULES["vp"]
    roles = {"teacher": teacher or gaussian(s, REAL_MEAN, REAL_VARIANCE, kind), "student": student, "critic": critic}
    return SwiftBrush(Settings(**settings), roles, guidance, few_steps(1))


def test_the_gradient_is_alpha_sigma_times_the_difference_of_the_scores():
    s, kind = SCHEDULES["vp"]
    student, step = affine(s, -0.3, 1.2), moment(COUNT)
    method = make(student, gaussian(s, -0.3, 1.44, kind))
    method.student_loss(prompts(COUNT), step)["matching"].backward()
    t = method.matched(step.uniform("t"))
    x_t = s.add_noise(-0.3 + 1.2 * step.normal("start", (1,)).double(), step.normal("noise", (1,)), t)
    alpha, sigma = like(s.alpha(t), x_t), like(s.sigma(t), x_t)
    eps = lambda m, v: sigma * (x_t - alpha * m) / (alpha**2 * v + sigma**2)
    gradient = sigma**2 * (eps(REAL_MEAN, REAL_VARIANCE) - eps(-0.3, 1.44))
    assert student.m.grad.item() == pytest.approx(gradient.mean().item(), rel=1e-4)


class Conditional:
    """N(text, v), text being the mean; 0 for the unconditional."""

    schedule = SCHEDULES["vp"][0]

    def __call__(self, x_t, t, cond):
        mean = cond.text
        alpha, sigma = like(self.schedule.alpha(t), x_t), like(self.schedule.sigma(t), x_t)
        x0 = mean + alpha * REAL_VARIANCE * (x_t - alpha * mean) / (alpha**2 * REAL_VARIANCE + sigma**2)
        return predict(x0, x_t, t, self.schedule, "v")


@pytest.mark.parametrize("w", [1.0, 4.5])
def test_the_unguided_teacher_is_a_fixed_point_at_any_scale(w):
    """Both are guided: a critic that equals the teacher, as at the start, gives no gradient whatever the student
    draws."""
    text = torch.full((COUNT, 1), 0.8, dtype=torch.float64)
    batch = Batch(torch.arange(COUNT), Condition(text=text, null=Condition(text=torch.zeros_like(text))), shape=(1,))
    student = affine(SCHEDULES["vp"][0], 3.0, 0.1)
    make(student, Conditional(), w, Conditional()).student_loss(batch, moment(COUNT))["matching"].backward()
    assert student.m.grad == 0 and student.s.grad == 0


def test_the_critic_denoises_the_student_s_own_sample_and_misses_some_prompts():
    s, prompts = SCHEDULES["vp"][0], []

    class Critic(Conditional):
        def __call__(self, x_t, t, cond):
            prompts.append(cond.text)
            return super().__call__(x_t, t, cond)

    text = torch.full((1000, 1), 0.8, dtype=torch.float64)
    batch = Batch(torch.arange(1000), Condition(text=text, null=Condition(text=torch.zeros_like(text))), shape=(1,))
    student = affine(s, -0.3, 1.2)
    method, step = make(student, Critic()), moment(1000)
    method.student_loss(batch, step)
    kept, before = step.kept["sample"], len(student.given)
    later = moment(1000, "critic")
    later.kept.update(step.kept)
    assert method.critic_loss(batch, later)["denoising"] > 0 and len(student.given) == before and not kept.requires_grad
    assert 60 < (prompts[-1] == 0).sum() < 140


def test_only_one_step_is_served():
    with pytest.raises(ValueError, match="one-step students, found 2 steps"):
        spelled(SwiftBrush, Settings(), 2, "vp")
