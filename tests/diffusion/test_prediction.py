from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.prediction import PARAMETERISATIONS, Prediction
from stepdistill.diffusion.schedule import like

from .schedules import SCHEDULES

T = torch.tensor([0.02, 0.3, 0.5, 0.71, 0.98], dtype=torch.float64)


def truth(schedule, kind: str, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(len(T), 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    a, b = PARAMETERISATIONS[kind](schedule, T)
    raw = like(a, x0) * x0 + like(b, x0) * eps
    return x0, eps, Prediction(raw.to(dtype), schedule.add_noise(x0, eps, T).to(dtype), T, schedule, kind)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", PARAMETERISATIONS)
@pytest.mark.parametrize("via", PARAMETERISATIONS)
def test_every_kind_goes_through_every_other_and_back(schedule, kind, via):
    s = SCHEDULES[schedule]
    x0, eps, p = truth(s, kind)
    assert torch.allclose(p.x0, x0, atol=1e-9) and torch.allclose(p.eps, eps, atol=1e-9)
    there = Prediction(p.view(via), p.x_t, p.t, s, via)
    assert torch.allclose(there.view(kind), p.raw, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", PARAMETERISATIONS)
def test_views_keep_their_definitions(schedule, kind):
    s = SCHEDULES[schedule]
    x0, eps, p = truth(s, kind)
    alpha, sigma, d_alpha, d_sigma = (like(f(T), x0) for f in (s.alpha, s.sigma, s.d_alpha, s.d_sigma))
    assert torch.allclose(p.v, alpha * eps - sigma * x0, rtol=1e-9, atol=1e-8)
    assert torch.allclose(p.velocity, d_alpha * x0 + d_sigma * eps, rtol=1e-9, atol=1e-7)
    assert torch.allclose(p.score, -eps / sigma, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("kind", PARAMETERISATIONS)
def test_float32_keeps_its_dtype(kind):
    x0, _, p = truth(SCHEDULES["vp"], kind, torch.float32)
    assert p.x0.dtype == p.velocity.dtype == torch.float32
    assert torch.allclose(p.x0.double(), x0, atol=2e-5)


@pytest.mark.parametrize("kind, t", [("x0", 0.0), ("eps", 1.0)])
def test_where_a_row_is_singular_its_own_view_is_still_the_output(kind, t):
    raw, x = torch.full((1, 2), 3.0), torch.ones(1, 2)
    p = Prediction(raw, x, torch.tensor([t], dtype=torch.float64), SCHEDULES["flow"], kind)
    assert torch.equal(p.view(kind), raw) and torch.equal({"x0": p.x0, "eps": p.eps}[kind], raw)
