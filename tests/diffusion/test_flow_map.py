from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.exact import Gaussian
from stepdistill.diffusion.flow_map import ddim_step, flow_map, secant_target, toward

from .schedules import SCHEDULES

F64 = torch.float64
T, R = torch.tensor([0.9, 0.5, 0.2], dtype=F64), torch.tensor([0.3, 0.4, 0.0], dtype=F64)


def setting(name: str):
    role = Gaussian(SCHEDULES[name], torch.tensor([0.7, -1.0], dtype=F64), torch.tensor([0.36, 2.0], dtype=F64))
    return role, torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_ddim_step_stays_at_r_equal_t_and_gives_x0_at_zero(name):
    role, x = setting(name)
    assert torch.allclose(flow_map(role, x, T, T), x)
    assert torch.allclose(flow_map(role, x, T, torch.zeros(3, dtype=F64)), role(x, T).x0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_toward_is_the_ddim_step_and_the_secant_its_inverse(name):
    role, x = setting(name)
    x0 = role(x, T).x0
    x_r = ddim_step(role(x, T), R)
    assert torch.allclose(toward(x0, x, T, R, role.schedule), x_r)
    assert torch.allclose(secant_target(x, x_r, T, R, role.schedule), x0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_secant_target_lands_where_the_exact_flow_does(name):
    role, x = setting(name)
    x_r = role.flow(x, T, R)
    assert torch.allclose(toward(secant_target(x, x_r, T, R, role.schedule), x, T, R, role.schedule), x_r)


def test_on_a_flow_the_secant_is_the_mean_velocity():
    role, x = setting("flow")
    x_r = role.flow(x, T, R)
    mean_velocity = (x - x_r) / (T - R)[:, None]
    assert torch.allclose(secant_target(x, x_r, T, R, role.schedule), x - T[:, None] * mean_velocity)


def test_two_halves_of_progressive_distillation_agree_with_the_paper():
    """Salimans & Ho 2022, algorithm 2: x = (z_t'' - (sigma_t'' / sigma_t) z_t) / (alpha_t'' - (sigma_t'' / sigma_t)
    alpha_t)."""
    role, x = setting("vp")
    s, t, middle, end = role.schedule, *(torch.full((3,), v, dtype=F64) for v in (0.8, 0.6, 0.4))
    z = ddim_step(role(ddim_step(role(x, t), middle), middle), end)
    q = (s.sigma(end) / s.sigma(t))[:, None]
    expected = (z - q * x) / (s.alpha(end)[:, None] - q * s.alpha(t)[:, None])
    assert torch.allclose(secant_target(x, z, t, end, s), expected)


def test_a_secant_without_a_chord_is_refused():
    role, x = setting("flow")
    with pytest.raises(ValueError, match="r < t"):
        secant_target(x, x, T, T, role.schedule)
