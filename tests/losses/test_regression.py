import math

import pytest
import torch

from stepdistill.losses.regression import absolute, distance, norm, pseudo_huber, squared, whole_huber


def test_per_sample_means():
    x, y = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    y[1] = 2.0
    assert squared(x, y).tolist() == [0.0, 4.0] and absolute(x, y).tolist() == absolute(y, x).tolist() == [0.0, 2.0]
    assert pseudo_huber(x, y, 1.5).tolist() == [0.0, 1.0]          # sqrt(4 + 2.25) - 1.5


def test_pseudo_huber_is_per_element():
    x = torch.tensor([[3.0, 0.0]])
    expected = (math.sqrt(9 + 1e-6) - 1e-3) / 2
    assert math.isclose(pseudo_huber(x, torch.zeros_like(x), 1e-3).item(), expected, rel_tol=1e-6)


def test_pseudo_huber_limits():
    d = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros_like(d)
    torch.testing.assert_close(pseudo_huber(d, zero, 1e4) * 2e4, squared(d, zero), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pseudo_huber(d, zero, 1e-9), d.abs().mean(1), rtol=1e-6, atol=1e-6)


def test_the_norm_is_free_of_size_and_its_gradient_of_what_is_off():
    x, y = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(norm(x, y), (x - y).square().mean((1, 2, 3)).sqrt())
    y[0] = x[0]
    slope, = torch.autograd.grad(norm(x.requires_grad_(), y).sum(), x)
    lengths = slope.flatten(1).norm(dim=1) * 100**0.5
    torch.testing.assert_close(lengths, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))


def test_distances_by_name():
    x, y = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(distance("squared", 0.1)(x, y), squared(x, y))
    assert torch.equal(distance("huber", 0.1)(x, y), pseudo_huber(x, y, 0.1))


def test_whole_huber_is_the_root_of_a_whole_sample_with_a_c_that_grows_with_it():
    """|d| = 5 in two numbers, c = 1: sqrt(25 + 2) - sqrt(2), over sqrt(2)."""
    d = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = whole_huber(d, torch.zeros_like(d), 1.0)
    assert found.tolist() == pytest.approx([(math.sqrt(27) - math.sqrt(2)) / math.sqrt(2), 0.0])
    torch.testing.assert_close(whole_huber(d, 0 * d, 1e4) * 2e4, squared(d, 0 * d), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole_huber(d, 0 * d, 1e-9), norm(d, 0 * d), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(torch.autograd.grad(found.sum(), d)[0]).all()
