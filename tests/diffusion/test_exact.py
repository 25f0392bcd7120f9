from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.exact import Gaussian, GaussianMixture
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.schedule import like

from .schedules import SCHEDULES

G = lambda seed=0: torch.Generator().manual_seed(seed)
REGULAR = ["vp", "vp-zero", "flow", "flow-3", "trig", "ve"]


def gaussian(schedule, full=True, **kwargs) -> Gaussian:
    root = torch.randn(6, 6, generator=G(1), dtype=torch.float64)
    covariance = root @ root.T / 6 if full else torch.linspace(0.05, 2, 6, dtype=torch.float64)
    return Gaussian(schedule, torch.randn(2, 3, generator=G(2), dtype=torch.float64), covariance, **kwargs)


def mixture(schedule) -> GaussianMixture:
    return GaussianMixture(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), [
        gaussian(schedule), gaussian(schedule, full=False),
        Gaussian(schedule, torch.full((2, 3), 1.5, dtype=torch.float64), torch.full((6,), 0.1, dtype=torch.float64))])


@pytest.mark.parametrize("schedule", REGULAR)
@pytest.mark.parametrize("make", [gaussian, mixture])
def test_the_score_is_the_gradient_of_the_log_density(schedule, make):
    role = make(SCHEDULES[schedule])
    t = torch.tensor([0.03, 0.4, 0.97], dtype=torch.float64)
    x = torch.randn(3, 2, 3, generator=G(), dtype=torch.float64).requires_grad_()
    score = torch.autograd.grad(role.log_density(x, t).sum(), x)[0]
    assert torch.allclose(role(x, t).score, score, rtol=1e-8, atol=1e-10)
    p = role(x, t)
    assert torch.allclose(like(role.schedule.alpha(t), x) * p.x0 + like(role.schedule.sigma(t), x) * p.eps, x)


def test_the_density_integrates_to_one_and_the_posterior_mean_is_the_integral():
    role = GaussianMixture.of(SCHEDULES["flow"], torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.8]]),
                              torch.tensor([0.2, 0.4]))
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)[:, None]
    step, zero = 16 / 20000, torch.zeros(20001, dtype=torch.float64)
    prior = role.log_density(grid, zero).exp()
    assert prior.sum() * step == pytest.approx(1, abs=1e-9)
    t, x = torch.tensor([0.6], dtype=torch.float64), torch.tensor([[0.37]], dtype=torch.float64)
    likelihood = (-0.5 * ((x - 0.4 * grid) / 0.6) ** 2).exp()[:, 0]
    mean = (prior * likelihood * grid[:, 0]).sum() / (prior * likelihood).sum()
    assert role(x, t).x0.item() == pytest.approx(mean.item(), abs=1e-9)


@pytest.mark.parametrize("schedule", REGULAR)
def test_the_gaussian_flow_follows_the_velocity_and_composes(schedule):
    role = gaussian(SCHEDULES[schedule])
    x = torch.randn(2, 2, 3, generator=G(), dtype=torch.float64)
    t, s, r = (torch.tensor(v, dtype=torch.float64).expand(2) for v in (0.9005, 0.5005, 0.2005))
    moved, h = role.flow(x, t, s), 1e-6
    slope = (role.flow(x, t, s + h) - role.flow(x, t, s - h)) / (2 * h)
    assert torch.allclose(slope, role(moved, s).velocity, rtol=1e-5, atol=1e-6)
    assert torch.allclose(role.flow(moved, s, r), role.flow(x, t, r))
    assert torch.allclose(role.flow(x, t, t), x)


def test_the_mixture_flow_is_the_gaussian_one_for_one_component_and_follows_its_velocity():
    schedule = SCHEDULES["flow"]
    one = GaussianMixture.of(schedule, torch.ones(1), torch.tensor([[0.7]]), torch.tensor([0.6]))
    two = GaussianMixture.of(schedule, torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.tensor([0.3, 0.5]))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    t, r, h = (torch.full((9,), v, dtype=torch.float64) for v in (0.9, 0.4, 1e-5))
    assert torch.allclose(one.flow(x, t, r), one.components[0].flow(x, t, r), atol=1e-10)
    slope = (two.flow(x, t, r + h) - two.flow(x, t, r - h)) / (2 * h[:, None])
    assert torch.allclose(slope, two(two.flow(x, t, r), r).velocity, atol=1e-5)
    with pytest.raises(ValueError, match="one dimension"):
        two.flow(torch.zeros(1, 2), t[:1], r[:1])


def test_samples_have_the_moments():
    role = gaussian(SCHEDULES["vp"])
    x = role.samples(200_000, G()).flatten(1)
    assert torch.allclose(x.mean(0), role.mean.flatten(), atol=0.02)
    assert torch.allclose(x.T.cov(), role.covariance, atol=0.05)
    x, which = mixture(SCHEDULES["vp"]).samples(100_000, G())
    assert x.shape == (100_000, 2, 3)
    assert torch.allclose(which.bincount() / 100_000, torch.tensor([0.2, 0.5, 0.3]), atol=0.01)


def test_a_label_that_no_component_has_is_refused():
    x, t = torch.zeros(2, 2, 3, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"one of \[0, 1, 2\], or negative for all; found \[1, 3\]"):
        mixture(SCHEDULES["flow"])(x, t, Condition(label=torch.tensor([1, 3])))


def test_a_label_keeps_its_components_and_guidance_takes_the_null():
    role = mixture(SCHEDULES["vp"])
    x, t = torch.randn(4, 2, 3, generator=G(), dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
    null = Condition(label=torch.full((4,), -1))
    cond = Condition(label=torch.tensor([0, 1, 2, 1]), null=null)
    given = role(x, t, cond)
    assert torch.allclose(given.x0[1], role.components[1](x, t).x0[1])
    assert torch.allclose(role(x, t, null).x0, role(x, t).x0)
    expected = role(x, t).x0 + 3 * (given.x0 - role(x, t).x0)
    assert torch.allclose(guided(role, 3.0)(x, t, cond).x0, expected)


def test_kinds_and_dtypes_are_those_asked_for():
    t = torch.full((2,), 0.5, dtype=torch.float64)
    x = torch.randn(2, 2, 3, generator=G())
    for kind in ("x0", "eps", "v", "velocity", "edm"):
        p = gaussian(SCHEDULES["flow"], kind=kind)(x, t)
        assert p.kind == kind and p.raw.dtype == torch.float32
        assert torch.allclose(p.x0, gaussian(SCHEDULES["flow"])(x, t).x0, atol=1e-5)
