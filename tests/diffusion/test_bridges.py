"""From x_t to x_s on Gaussian data, where every way is known."""
from functools import partial

import pytest
import torch

from stepdistill.diffusion.bridges import anchored, bridge
from stepdistill.diffusion.exact import Gaussian
from stepdistill.diffusion.flow_map import ddim_step
from stepdistill.diffusion.solvers import SOLVERS, STOCHASTIC, ddim, sde_ddim

from .schedules import SCHEDULES

F64 = torch.float64
C = 0.6
T, S = torch.tensor([0.9, 0.6, 0.5, 0.3], dtype=F64), torch.tensor([0.5, 0.55, 0.0, 0.2], dtype=F64)
NAMES = ("vp", "vp-zero", "flow", "trig")


def setting(name: str) -> tuple[Gaussian, torch.Tensor]:
    role = Gaussian(SCHEDULES[name], torch.tensor([0.7, -1.0], dtype=F64), torch.full((2,), C**2, dtype=F64))
    return role, torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


def factor(schedule, t, r):
    """Of one DDIM step, which multiplies x - alpha m by it."""
    (a, s), (a_r, s_r) = ((schedule.alpha(u), schedule.sigma(u)) for u in (t, r))
    return (a_r * a * C**2 + s_r * s) / (a**2 * C**2 + s**2)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_sub_steps_of_ddim_multiply_by_their_factors(name, n):
    role, x = setting(name)
    schedule, product = role.schedule, torch.ones_like(T)
    for i in range(n):
        product = product * factor(schedule, T + (S - T) * i / n, T + (S - T) * (i + 1) / n)
    alpha_t, alpha_s = schedule.alpha(T)[:, None], schedule.alpha(S)[:, None]
    known = alpha_s * role.mean + product[:, None] * (x - alpha_t * role.mean)
    assert torch.allclose(bridge(ddim, role, x, T, S, n=n), known, rtol=1e-10)


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_no_network_of_discrete_times_is_asked_below_its_first(name):
    role, x = setting(name)
    t, asked = torch.tensor([1.0, 2.0, 5.0, 40.0], dtype=F64) / 1000, []

    class Listening:
        schedule = role.schedule

        def __call__(self, x, t, cond=None):
            asked.append(t)
            return role(x, t, cond)

    found = bridge(partial(sde_ddim, eta=0.5), Listening(), x, t, 0 * t, n=3, noise=lambda i, shape: torch.ones(shape))
    even = t * (1 - torch.arange(3, dtype=F64)[:, None] / 3)
    assert torch.allclose(torch.stack(asked), even.clamp(min=1e-3) if name == "vp" else even, rtol=1e-12)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("solver", sorted({*SOLVERS} - {*STOCHASTIC}))
@pytest.mark.parametrize("name", NAMES)
def test_each_sample_goes_its_own_way(name, solver):
    """As one by one with times of its own, those that end at the data among them."""
    role, x = setting(name)
    found = bridge(SOLVERS[solver], role, x, T, S, n=3)
    for i in range(4):
        alone = SOLVERS[solver](role, x[i:i + 1],
                                torch.stack([T[i], *(T[i] + (S[i] - T[i]) * j / 3 for j in (1, 2)), S[i]]))
        assert torch.allclose(found[i:i + 1], alone, rtol=1e-10)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_sub_steps_come_to_the_flow_map_on_either_side(solver, order):
    role, x = setting("flow")
    for t, s in ((T[:2], S[:2]), (S[:2], T[:2])):
        errors = [(bridge(SOLVERS[solver], role, x[:2], t, s, n=n) - role.flow(x[:2], t, s)).abs().max()
                  for n in (8, 16, 32)]
        assert all(a / b > 0.85 * 2**order for a, b in zip(errors, errors[1:]))


def contraction(eta):
    """b_1 of 48 steps, where b_t = b_s (alpha_s alpha_t C^2 + sqrt(sigma_s^2 - fresh^2) sigma_t) / v_t^2 is the fixed
    point of the squared loss, E[f(x_s) | x_t] = m + b_t (x - alpha_t m)."""
    role, times = (Gaussian(SCHEDULES["trig"], torch.zeros(1, dtype=F64), torch.tensor([C**2], dtype=F64)),
                   torch.linspace(1, 0, 49, dtype=F64))
    b = torch.ones((), dtype=F64)
    for t, s in zip(times[:-1], times[1:]):
        unit = torch.ones(1, 1, dtype=F64)
        kept, fresh = (bridge(partial(sde_ddim, eta=eta), role, x, t[None], s[None],
                              noise=lambda i, shape, z=z: z * torch.ones(shape, dtype=F64)).item()
                       for x, z in ((unit, 0.0), (0 * unit, 1.0)))
        b = b * kept
        (a, g), (a_s, g_s) = ((role.schedule.alpha(u), role.schedule.sigma(u)) for u in (t, s))
        sigma = eta * g_s / g * (1 - (a / a_s) ** 2).sqrt()           # as alpha^2 + sigma^2 = 1
        assert fresh == pytest.approx(sigma.item(), abs=1e-12)
        assert kept == pytest.approx(((a_s * a * C**2 + (g_s**2 - fresh**2) ** 0.5 * g) / (a**2 * C**2 + g**2)).item(),
                                     abs=1e-9)
    return b.item()


def test_a_stochastic_bridge_contracts():
    """The more the more of its noise is fresh: all of it leaves little but the mean. The ODE's own map keeps 0.6."""
    found = [contraction(eta) for eta in (0.0, 0.1, 0.3, 1.0)]
    assert 0.58 < found[0] < 0.6 and found == sorted(found, reverse=True)
    assert 0.96 < found[1] / found[0] < 0.98 and 0.7 < found[2] / found[0] < 0.8 and found[3] < 0.02


def test_a_stochastic_bridge_does_not_go_up():
    role, x = setting("vp")
    with pytest.raises(ValueError, match="down in time alone"):
        bridge(sde_ddim, role, x, S, T, noise=lambda i, shape: torch.zeros(shape, dtype=F64))


@pytest.mark.parametrize("name", NAMES)
def test_the_path_of_the_data_is_the_teacher_s_on_average(name):
    """E[x_s | x_t] over the data is the DDIM step of the exact denoiser, so that both have one fixed point."""
    role, _ = setting(name)
    t, s = (torch.full((400_000,), u, dtype=F64) for u in (0.6, 0.5))
    g = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(400_000, 2, generator=g, dtype=F64) for _ in range(2))
    x0 = role.mean + C * x0
    x_t, x_s = (role.schedule.add_noise(x0, eps, u) for u in (t, s))
    apart = x_s - ddim_step(role(x_t, t), s)
    moments = torch.cat([apart, apart * x_t], 1)
    assert (moments.mean(0).abs() < 5 * moments.std(0) / 400_000**0.5).all()


def test_where_the_way_ends_the_state_itself_is_the_target():
    asked = []
    x, inside = torch.randn(4, 2, dtype=F64), S > 0.1
    found = anchored(lambda x, u: asked.append(u) or 7 * x / u[:, None], x, S, T, inside)
    assert torch.equal(asked[0], torch.where(inside, S, T)) and torch.equal(found[2], x[2])
    assert torch.allclose(found[inside], (7 * x / S[:, None])[inside])
