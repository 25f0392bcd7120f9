import pytest
import torch

from stepdistill.losses.matching import score_identity

# Two independent variables of mean 0 and variance 1, whose squares' and product's means are those of two normal ones.
Z, EPS = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float64)[:, :, None]
SIGMA2, REAL_MEAN = 0.7, 0.4


def gradient(mean: float, deviation: float, real_variance: float, alpha: float) -> tuple[float, float]:
    """In the mean and the deviation of a student m + s z, at one noise level of alpha_t = 1, with exact denoisers."""
    m, s = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mean, deviation))
    x = m + s * Z
    x_t = x + SIGMA2**0.5 * EPS
    denoised = lambda m, v: (v * x_t + SIGMA2 * m) / (v + SIGMA2)
    loss = score_identity(x, denoised(REAL_MEAN, real_variance), denoised(mean, deviation**2), alpha, torch.ones(4)).mean()
    return tuple(g.item() for g in torch.autograd.grad(loss, (m, s)))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_equal_variances(alpha):
    found, _ = gradient(-0.9, 1.3, 1.3**2, alpha)
    assert found == pytest.approx(SIGMA2**2 * (-0.9 - REAL_MEAN) / (1.3**2 + SIGMA2) ** 2, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("s", [0.3, 2.5])
def test_equal_means(s, alpha):
    real_variance = 0.5
    k, real = s * s / (s * s + SIGMA2), real_variance / (real_variance + SIGMA2)
    found = gradient(REAL_MEAN, s, real_variance, alpha)
    assert found == pytest.approx((0, 2 * s * (k - real) * (1 - k + (1 - alpha) * (k - real))), rel=1e-12, abs=1e-15)


def test_above_one_a_student_that_is_much_too_wide_is_driven_wider():
    assert gradient(REAL_MEAN, 4.0, 0.5, 1.0)[1] > 0 > gradient(REAL_MEAN, 4.0, 0.5, 1.2)[1]


def test_at_one_half_it_is_the_difference_of_two_errors_sample_by_sample():
    x, real, fake = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0])
    known = weight * ((real - x).square() - (fake - x).square()).mean((1, 2, 3))
    torch.testing.assert_close(2 * score_identity(x, real, fake, 0.5, weight), known)
