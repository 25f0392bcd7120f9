from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.schedule import VariancePreserving

from .schedules import ALPHAS_CUMPROD, SCHEDULES

T = torch.tensor([0.0105, 0.1235, 0.5005, 0.7777, 0.9995], dtype=torch.float64)      # inside segments of the 1000 nodes


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivatives_are_those_of_alpha_and_sigma(name):
    s, h = SCHEDULES[name], 1e-6
    for value, slope in ((s.alpha, s.d_alpha), (s.sigma, s.d_sigma)):
        assert torch.allclose((value(T + h) - value(T - h)) / (2 * h), slope(T), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_noise_level_leads_back_to_its_time(name):
    s = SCHEDULES[name]
    t = torch.linspace(0, 1, 137, dtype=torch.float64)
    assert torch.allclose(s.time_at(s.angle(t)), t, atol=1e-11)


@pytest.mark.parametrize("name", ["vp", "vp-zero"])
def test_nodes_are_exact_and_the_ends_clean(name):
    s = SCHEDULES[name]
    timesteps = torch.arange(1000)
    t = (timesteps + 1).double() / 1000
    squares = torch.tensor(s.alphas_cumprod, dtype=torch.float64)
    assert torch.allclose(s.alpha(t) ** 2, squares, rtol=1e-14, atol=1e-16)
    assert torch.equal((1000 * t - 1).round().long(), timesteps)
    zero = torch.zeros(1, dtype=torch.float64)
    assert s.alpha(zero) == 1 and s.sigma(zero) == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_added_twice_is_noise_added_once(name):
    """From s to t: the signal is alpha_t's, and old and fresh noise together are sigma_t's."""
    schedule, (x0, old, new) = SCHEDULES[name], torch.eye(3, dtype=torch.float64)[:, None].expand(3, len(T) - 1, 3)
    s, t = T[:-1], T[1:]
    x_t = schedule.renoise(schedule.add_noise(x0, old, s), new, s, t)
    assert torch.allclose(x_t[:, 0], schedule.alpha(t)) and torch.allclose(x_t[:, 1:].norm(dim=1), schedule.sigma(t))
    assert torch.allclose(schedule.renoise(x0, new, 0 * t, t), schedule.add_noise(x0, new, t))
    assert torch.allclose(schedule.renoise(x0, new, t, t), x0)


def test_a_time_that_went_through_rounding_is_still_its_node():
    s = VariancePreserving.of(ALPHAS_CUMPROD)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.equal(s.alpha(t * (1 + 1e-10)), s.alpha(t))


@pytest.mark.parametrize("name", ["vp", "vp-zero", "flow", "trig"])
def test_samplers_start_from_pure_noise_and_nothing_else_changes(name):
    s, t = SCHEDULES[name], torch.tensor([0.25, 1 - 1e-9, 1.0], dtype=torch.float64)
    x0, eps = torch.full((3, 2), 5.0, dtype=torch.float64), torch.ones(3, 2)
    started = s.start(x0, eps, t)
    assert torch.equal(started[:2], s.add_noise(x0, eps, t)[:2]) and (started[2] == 1).all()
