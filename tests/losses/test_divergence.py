"""The table of divergences against derivatives, and the weight against a finite difference of the divergence itself."""
from __future__ import annotations

import pytest
import torch

from stepdistill.losses.divergence import (
    DIVERGENCES,
    elasticity,
    mixture_logits,
    mixture_weight,
    ratio,
    relative_weight,
)

R = torch.tensor([0.1, 0.5, 1.0, 3.0, 12.0], dtype=torch.float64)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_h_is_the_second_derivative_of_f(name):
    """f(1) = 0, f is convex, and h = r^2 f''."""
    f, h, _ = DIVERGENCES[name]
    r = R.clone().requires_grad_()
    slope = torch.autograd.grad(f(r).sum(), r, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), r)[0]
    torch.testing.assert_close(h(R), R**2 * curvature)
    assert abs(f(torch.ones((), dtype=torch.float64))) < 1e-12 and (curvature > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weighted_difference_of_scores_is_the_divergences_gradient(name):
    """p = N(0, 1), q = N(m, 1) in one dimension: dD/dm = -E_q[h(r) (score p - score q)], both sides by a fine sum."""
    x, m = torch.linspace(-12, 12, 200_001, dtype=torch.float64), 0.7
    f, h, _ = DIVERGENCES[name]
    density = lambda mean: torch.exp(-(x - mean) ** 2 / 2) / (2 * torch.pi) ** 0.5
    r = lambda mean: torch.exp((x - mean) ** 2 / 2 - x**2 / 2)
    divergence = lambda mean: torch.trapezoid(density(mean) * f(r(mean)), x)
    slope = (divergence(m + 1e-4) - divergence(m - 1e-4)) / 2e-4
    found = -torch.trapezoid(density(m) * h(r(m)) * (-x + (x - m)), x)
    assert found.item() == pytest.approx(slope.item(), rel=1e-5)


def test_the_ratio_of_logits():
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0], [40.0, 60.0], [-3.0, -3.0]])
    assert ratio(logits).tolist() == pytest.approx([1.0, torch.e**2, 20.0, 0.1])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_where_both_are_alike_the_weight_is_1(name):
    assert relative_weight(name, torch.ones(2)).tolist() == [1, 1]
    assert (relative_weight(name, R).diff() >= 0).all() or name == "softened_rkl"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_elasticity_of_h(name):
    """d log h / d log r."""
    r = R.clone().requires_grad_()
    h = DIVERGENCES[name][1](r)
    slope = torch.zeros_like(R) if name == "reverse_kl" else torch.autograd.grad(h.log().sum(), r)[0] * R
    torch.testing.assert_close(elasticity(name, R), slope)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_weight_of_a_mixture_is_that_of_its_skewed_js(share):
    """f = a r log r - (a r + 1 - a) log(a r + 1 - a): a KL(p, m) + (1 - a) KL(q, m), m = a p + (1 - a) q; r^2 f'' over
    that at 1."""
    r, mixed = R.clone().requires_grad_(), lambda r: share * r + 1 - share
    f = lambda r: share * r * r.log() - mixed(r) * mixed(r).log()
    slope = torch.autograd.grad(f(r).sum(), r, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), r)[0]
    torch.testing.assert_close(mixture_weight(torch.tensor(share), R), R**2 * curvature / (share * (1 - share)))


def test_mixtures_at_their_ends_and_the_odds_of_a_part():
    assert (mixture_weight(torch.ones(()), R).tolist() == pytest.approx([1] * 5)
            and torch.equal(mixture_weight(torch.zeros(()), R), R))
    shares = torch.full((5,), 0.3, dtype=torch.float64)
    D = mixture_logits(R.log()[:, None], shares).sigmoid()[:, 0]
    torch.testing.assert_close(D, 0.3 * mixture_weight(shares, R))
