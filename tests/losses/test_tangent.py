from math import cos, pi, sin

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from stepdistill.diffusion.exact import Gaussian
from stepdistill.diffusion.schedule import TrigFlow
from stepdistill.losses.tangent import exact, normalised, pushed, trig_difference, trig_tangent

F64 = torch.float64


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def waves(x, t):
    """sin(3 t + x y) with y the other coordinate."""
    return (3 * t[:, None] + x * x.flip(1)).sin()


def slope_of_waves(x, t, dx, dt):
    return (3 * t[:, None] + x * x.flip(1)).cos() * (3 * dt + dx * x.flip(1) + x * dx.flip(1))


def case(count=5):
    x, dx = draws(2, count, 2)
    return x, torch.linspace(0.2, 0.8, count, dtype=F64), dx, 2 / pi


def test_the_exact_derivative_is_the_closed_one():
    x, t, dx, dt = case()
    torch.testing.assert_close(exact(waves, x, t, dx, dt), slope_of_waves(x, t, dx, dt), rtol=1e-12, atol=1e-12)


def test_differences_are_of_first_order_and_err_as_they_say():
    x, t, dx, dt = case()
    wide, narrow = (trig_difference(waves, x, t, dx, width) - exact(waves, x, t, dx, dt) for width in (2e-4, 1e-4))
    ahead, behind = (waves(cos(s) * x + sin(s) * dx, t + s * dt) for s in (1e-3, -1e-3))
    bend = (ahead + behind - 2 * waves(x, t)) / 1e-6
    torch.testing.assert_close(narrow, -1e-4 / 2 * (waves(x, t) + bend), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(wide, 2 * narrow, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("width", [0.5, 0.05])
def test_differences_are_exact_on_a_way_that_keeps_its_x0_and_eps(width):
    trig = TrigFlow()
    x0, eps = draws(2, 5, 2)
    t = torch.linspace(0.4, 1.0, 5, dtype=F64)
    v = lambda x, t: trig.alpha(t)[:, None] * eps - trig.sigma(t)[:, None] * x0
    x = trig.add_noise(x0, eps, t)
    torch.testing.assert_close(trig_difference(v, x, t, v(x, t), width), -x, rtol=1e-9, atol=1e-9)


def test_differences_ask_for_no_earlier_time():
    asked = []

    def field(x, t):
        asked.append(t)
        return waves(x, t)
    x, _, dx, _ = case()
    t = torch.tensor([0.101, 0.11, 0.5, 0.89, 1.0], dtype=F64)
    found = trig_difference(field, x, t, dx, width=0.1, first=0.1)
    now, before = asked
    assert torch.equal(now, t) and before.min() >= 0.1 and found.isfinite().all()
    torch.testing.assert_close((t - before)[2:], torch.full((3,), 0.2 / pi, dtype=F64))


def attends(x, t):
    """By the one kernel that has a derivative forward, as roles take care to do."""
    q = x.reshape(len(x), 1, 3, 4) * (1 + t.to(x)[:, None, None, None])
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, q.flip(2), q).reshape(x.shape)


@pytest.mark.parametrize("dtype, width, tolerance", [(torch.float64, 1e-6, 1e-5), (torch.float32, 1e-3, 1e-2)])
def test_attention_has_a_derivative(dtype, width, tolerance):
    x, dx = draws(2, 5, 12).to(dtype)
    t = torch.linspace(0.2, 0.8, 5, dtype=F64)
    with sdpa_kernel(SDPBackend.MATH):                 # a role of a network sees to that itself
        found, secant = exact(attends, x, t, dx, 2 / pi), trig_difference(attends, x, t, dx, width)
    assert found.dtype == dtype and ((found - secant).norm() / found.norm()).item() < tolerance


@pytest.mark.parametrize("derivative",
                         [lambda *given: exact(*given, 2 / pi), lambda *given: trig_difference(*given, 1e-3)],
                         ids=["exact", "difference"])
def test_no_gradient_flows_through_and_autocast_is_off(derivative):
    weight = torch.eye(2, requires_grad=True)
    x, t, dx, _ = case()
    with torch.autocast("cpu", torch.bfloat16):
        found = derivative(lambda x, t: linear(x, weight), x.float(), t, dx.float())
        assert torch.is_autocast_enabled("cpu")
    assert not found.requires_grad
    torch.testing.assert_close(found, dx.float(), rtol=0, atol=5e-3)


def test_the_tangent_is_that_of_the_consistency_function():
    """Of a teacher's own mean, which is no flow map: along the ODE of a Gaussian, followed in closed form."""
    trig, h = TrigFlow(), 1e-4
    law = Gaussian(trig, torch.tensor([0.7, -1.0], dtype=F64), torch.tensor([0.36, 2.0], dtype=F64))
    student = Gaussian(trig, torch.tensor([0.1, 0.4], dtype=F64), torch.tensor([1.5, 0.5], dtype=F64))
    x, t, _, radian = case()
    v, velocity = student(x, t).v, law(x, t).v
    slope = exact(lambda x, t: student(x, t).v, x, t, velocity, radian)
    after, before = (student(law.flow(x, t, t + s * radian), t + s * radian).x0 for s in (h, -h))
    torch.testing.assert_close(trig_tangent(x, t, v, velocity, slope),
                               trig.alpha(t)[:, None] * (after - before) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(trig_tangent(x, t, v, velocity, slope, 0.0),
                               trig.alpha(t)[:, None] ** 2 * (velocity - v))


def test_normalised_is_free_of_size_and_regular_at_zero():
    g = torch.cat([draws(1, 4, 3, 3), 100 * draws(1, 4, 3, 3), torch.zeros(1, 4, 3, 3, dtype=F64)])
    scaled = normalised(g, 0.1)
    rms = g.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(scaled.square().mean((1, 2, 3)).sqrt(), rms / (rms + 0.1))
    torch.testing.assert_close(normalised(g.repeat(1, 2, 1, 1), 0.1)[:, :4], scaled)
    assert torch.equal(scaled[2], g[2])


def test_pushed_moves_along_g():
    v, g = draws(3, 2).requires_grad_(), draws(3, 2).flip(0).requires_grad_()
    loss = pushed(v, g)
    loss.sum().backward()
    torch.testing.assert_close(v.grad, -g.detach())                  # -2 g over the 2 numbers of a sample
    torch.testing.assert_close(loss, g.square().mean(1))
    assert g.grad is None
