import numpy as np
import pytest
import torch

from stepdistill.diffusion.schedule import RectifiedFlow, TrigFlow, VarianceExploding
from stepdistill.losses.matching import from_state, importance, score_identity

# Two independent variables of mean 0 and variance 1, whose squares' and product's means are those of two normal ones.
Z, EPS = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float64)[:, :, None]
SIGMA2, REAL_MEAN = 0.7, 0.4


def gradient(mean: float, deviation: float, real_variance: float, alpha: float) -> tuple[float, float]:
    """In the mean and the deviation of a student m + s z, at one noise level of alpha_t = 1, with exact denoisers."""
    m, s = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mean, deviation))
    x = m + s * Z
    x_t = x + SIGMA2**0.5 * EPS
    denoised = lambda m, v: (v * x_t + SIGMA2 * m) / (v + SIGMA2)
    loss = score_identity(x, denoised(REAL_MEAN, real_variance), denoised(mean, deviation**2), alpha,
                          torch.ones(4)).mean()
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


SCHEDULES = {"flow": RectifiedFlow(), "trig": TrigFlow(), "ve": VarianceExploding(2.0)}
F64 = torch.float64
NODES, SHARES = (torch.tensor(each, dtype=F64) for each in np.polynomial.hermite_e.hermegauss(60))
SHARES = SHARES / SHARES.sum()


def pairs() -> tuple[torch.Tensor, ...]:
    """Two independent normal numbers on a grid that integrates polynomials of them exactly, and its shares."""
    one, two = (each.flatten()[:, None] for each in torch.meshgrid(NODES, NODES, indexing="ij"))
    return one, two, (SHARES[:, None] * SHARES).flatten()


def slope(x: torch.Tensor, y: torch.Tensor, shares: torch.Tensor) -> float:
    """Of the weighted regression of y on x, without a constant."""
    return ((shares * (x * y)[:, 0]).sum() / (shares * (x * x)[:, 0]).sum()).item()


@pytest.mark.parametrize("s", [0.0, 0.4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_critic_of_noisy_states_learns_the_denoiser_of_their_law(name, s):
    """x_s ~ N(0, V_s): what it is shown at t makes x_t, and its regression is that of the law of x_t."""
    schedule, v = SCHEDULES[name], 1.7
    t, s = torch.tensor([0.7], dtype=F64), torch.tensor([s], dtype=F64)
    (a, g), (a_s, g_s) = ((schedule.alpha(u).item(), schedule.sigma(u).item()) for u in (t, s))
    unit, eps, shares = pairs()
    x_s = (a_s**2 * v + g_s**2) ** 0.5 * unit
    x_t = schedule.renoise(x_s, eps, s, t)
    x0, noise = from_state(x_s, eps, s.expand(len(x_s)), t.expand(len(x_s)), schedule)
    torch.testing.assert_close(a * x0 + g * noise, x_t)
    assert slope(x_t, x0, shares) == pytest.approx(a * v / (a**2 * v + g**2), rel=1e-9)
    assert slope(x_t, noise, shares) == pytest.approx(g / (a**2 * v + g**2), rel=1e-9)
    if s == 0:
        assert torch.equal(x0, x_s / a_s) and torch.equal(noise, eps)
    if name == "flow":                                       # the published velocity
        fresh = (g**2 - (a / a_s * g_s) ** 2) ** 0.5
        torch.testing.assert_close(noise - x0, (g + a * g_s**2 / a_s**2) / fresh * eps - x_s / a_s)


def test_a_critic_that_is_told_the_clean_guess_is_unbiased_under_its_importance():
    """x_0 ~ N(0, 0.5), and a state that the same number makes, x_s = alpha_s x_0 + sigma_s h x_0: unweighted it
    regresses x_0 on x_t of another law; weighted, on x_t = alpha_t x_0 + sigma_t e."""
    schedule, v, h = SCHEDULES["flow"], 0.5, 0.3
    s, t = torch.tensor([0.2], dtype=F64), torch.tensor([0.6], dtype=F64)
    line = torch.linspace(-9, 9, 1201, dtype=F64)
    unit, eps = (each.flatten()[:, None] for each in torch.meshgrid(line, line, indexing="ij"))
    shares = (-(unit**2 + eps**2) / 2).exp()[:, 0]
    x0 = v**0.5 * unit
    x_s = schedule.alpha(s) * x0 + schedule.sigma(s) * h * x0
    x_t = schedule.renoise(x_s, eps, s, t)
    right = 0.4 * v / (0.4**2 * v + 0.6**2)
    weight = importance(x_t, x0, eps, t.expand(len(x0)), schedule, 1.0)
    assert slope(x_t, x0, shares * weight) == pytest.approx(right, rel=1e-6)
    assert abs(slope(x_t, x0, shares) / right - 1) > 0.05
    tempered = importance(x_t, x0, eps, t.expand(len(x0)), schedule, 4.0)
    torch.testing.assert_close(tempered**4, weight)
    mass = [(shares[unit[:, 0] == u] * weight[unit[:, 0] == u]).sum() / shares[unit[:, 0] == u].sum()
            for u in line[::300]]
    fresh = (0.6**2 - (0.4 / 0.8 * 0.2) ** 2) ** 0.5
    assert torch.stack(mass).tolist() == pytest.approx([0.6 / fresh] * len(mass), rel=1e-6)      # one factor for all
