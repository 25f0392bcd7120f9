import pytest
import torch

from stepdistill.methods.base import Inference
from stepdistill.methods.distribution.diff_instruct import DiffInstruct, Settings

from .players import REAL_MEAN, REAL_VARIANCE, SCHEDULES, affine, few_steps, gaussian, moment, prompts, spelled

COUNT = 40_000


def method(schedule: str, student, critic, ratio: float) -> DiffInstruct:
    """All noise at one level, sigma / alpha = ratio."""
    s, kind = SCHEDULES[schedule]
    settings = Settings(mean=float(torch.tensor(ratio).log()), std=1e-9)
    roles = {"teacher": gaussian(s, REAL_MEAN, REAL_VARIANCE, kind), "student": student, "critic": critic}
    return DiffInstruct(settings, roles, 1.0, few_steps(1, schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_gradient_is_that_of_the_divergence_between_gaussians(schedule, ratio):
    """With exact scores, in units of sigma / alpha: d/dm = r^2 (m - m_r) / (v_r + r^2), and
    d/ds = s r^2 (v - v_r) / ((v + r^2)(v_r + r^2))."""
    m, s = -0.3, 1.2
    student = affine(SCHEDULES[schedule][0], m, s)
    critic = gaussian(SCHEDULES[schedule][0], m, s * s, SCHEDULES[schedule][1])
    method(schedule, student, critic, ratio).student_loss(prompts(COUNT), moment(COUNT))["matching"].backward()
    v, r2 = s * s, ratio * ratio
    assert student.m.grad.item() == pytest.approx(r2 * (m - REAL_MEAN) / (REAL_VARIANCE + r2), rel=0.03)
    assert student.s.grad.item() == pytest.approx(s * r2 * (v - REAL_VARIANCE) / ((v + r2) * (REAL_VARIANCE + r2)),
                                                  rel=0.05)


def test_a_student_of_the_right_law_gets_no_gradient_at_all():
    student = affine(SCHEDULES["vp"][0], REAL_MEAN, REAL_VARIANCE**0.5)
    critic = gaussian(SCHEDULES["vp"][0], REAL_MEAN, REAL_VARIANCE, "v")
    method("vp", student, critic, 1.0).student_loss(prompts(100), moment(100))["matching"].backward()
    assert student.m.grad == 0 and student.s.grad == 0


def test_the_critic_s_optimum_is_the_student_s_exact_denoiser():
    """Its loss is least there, and moves by the square of an error in the mean: SNR + 1 times ((1 - k) d)^2."""
    schedule, kind = SCHEDULES["vp"]
    student, ratio, losses = affine(schedule, -0.3, 1.2), 1.5, []
    for error in (-0.2, 0.0, 0.2):
        critic = gaussian(schedule, -0.3 + error, 1.44, kind)
        losses.append(method("vp", student, critic, ratio).critic_loss(prompts(COUNT),
                                                                       moment(COUNT, "critic"))["denoising"].item())
    k = 1.44 / (1.44 + ratio**2)
    expected = (1 / ratio**2 + 1) * ((1 - k) * 0.2) ** 2
    assert losses[0] + losses[2] - 2 * losses[1] == pytest.approx(2 * expected, rel=1e-3)
    assert min(losses) == losses[1]


def test_only_one_step_is_served():
    assert isinstance(DiffInstruct.inference(Settings(), 1, SCHEDULES["vp"][0]), Inference)
    with pytest.raises(ValueError, match="one-step students, found 4 steps"):
        spelled(DiffInstruct, Settings(), 4, "vp")
