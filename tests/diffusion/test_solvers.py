"""Solvers: measured order on closed-form teachers, and equality with the stock schedulers of the same name."""
from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from stepdistill.diffusion.exact import Gaussian, GaussianMixture
from stepdistill.diffusion.flow_map import ddim_step
from stepdistill.diffusion.solvers import SOLVERS, STOCHASTIC, addim_step, sde_ddim

from .schedules import SCHEDULES
from .stock import KINDS, SD15, NetworkRole, schedule_of, stock_loop

ORDERS = {"ddim": 1, "heun": 2, "dpmpp_2m": 2}            # euler is ddim's function
F64 = torch.float64


def teachers(schedule):
    mixture = GaussianMixture.of(schedule, torch.tensor([0.4, 0.6]), torch.tensor([[-0.9], [0.7]]),
                                 torch.tensor([0.5, 0.35]))
    return {"gaussian": Gaussian(schedule, torch.tensor([0.7, -0.2], dtype=F64), torch.tensor([0.36, 2.0], dtype=F64)),
            "mixture": mixture}


def error(name: str, role, x, start: float, end: float, steps: int) -> float:
    times = torch.linspace(start, end, steps + 1, dtype=F64)
    exact = role.flow(x, times[:1].expand(len(x)), times[-1:].expand(len(x)))
    return (SOLVERS[name](role, x, times) - exact).abs().mean().item()


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("schedule", ["vp", "flow", "flow-3", "trig"])
@pytest.mark.parametrize("teacher", ["gaussian", "mixture"])
def test_measured_order(name, schedule, teacher):
    role = teachers(SCHEDULES[schedule])[teacher]
    x = torch.randn(16, {"gaussian": 2, "mixture": 1}[teacher], generator=torch.Generator().manual_seed(0), dtype=F64)
    counts = torch.tensor([30, 60, 120], dtype=F64)
    errors = torch.tensor([error(name, role, x, 0.9, 0.1, int(n)) for n in counts], dtype=F64)
    h, e = counts.log() - counts.log().mean(), errors.log() - errors.log().mean()
    assert -(h * e).sum() / (h * h).sum() == pytest.approx(ORDERS[name], abs=0.2)


def test_the_whole_way_from_pure_noise_to_data():
    role = teachers(SCHEDULES["flow"])["gaussian"]
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    for name in ORDERS:
        assert error(name, role, x, 1.0, 0.0, 100) < 0.05


@pytest.mark.parametrize("schedule", ["flow", "vp", "trig"])
def test_one_step_multiplies_by_the_known_coefficient(schedule):
    """A DDIM step multiplies x_t - alpha_t m by (alpha_r alpha_t C^2 + sigma_r sigma_t) / (alpha_t^2 C^2 +
    sigma_t^2)."""
    s = SCHEDULES[schedule]
    role = Gaussian(s, torch.tensor([0.7], dtype=F64), torch.tensor([0.36], dtype=F64))
    t, r, x = torch.tensor([0.8], dtype=F64), torch.tensor([0.3], dtype=F64), torch.tensor([[1.1]], dtype=F64)
    a_t, a_r, s_t, s_r = s.alpha(t), s.alpha(r), s.sigma(t), s.sigma(r)
    k = (a_r * a_t * 0.36 + s_r * s_t) / (a_t**2 * 0.36 + s_t**2)
    assert torch.allclose(SOLVERS["ddim"](role, x, torch.cat([t, r])), a_r * 0.7 + k * (x - a_t * 0.7))


@pytest.mark.parametrize("k", [1, 2, 4, 8, 25])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, make, more", [
    ("ddim", DDIMScheduler, {"clip_sample": False}), ("euler", EulerDiscreteScheduler, {}),
    ("heun", HeunDiscreteScheduler, {}),
    ("dpmpp_2m", DPMSolverMultistepScheduler, {})])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_equal_to_the_stock_scheduler(name, make, more, k, kind, spacing):
    scheduler = make(**SD15, **more, timestep_spacing=spacing, prediction_type=KINDS[kind])
    role = NetworkRole(schedule_of(scheduler), kind)
    noise = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(3))
    theirs = stock_loop(scheduler, noise, num_inference_steps=k)
    timesteps = torch.tensor(sorted(set(scheduler.timesteps.tolist()), reverse=True), dtype=F64)
    times = torch.cat([(timesteps + 1) / 1000, torch.zeros(1, dtype=F64)])
    start = role.schedule.sigma(times[:1]).float() if name in ("euler", "heun") and spacing == "trailing" else 1.0
    ours = SOLVERS[name](role, start * noise, times)
    assert (ours - theirs).abs().max() <= 3e-5 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("k", [1, 2, 4, 8, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name, make", [("euler", FlowMatchEulerDiscreteScheduler),
                                        ("heun", FlowMatchHeunDiscreteScheduler)])
def test_equal_to_the_stock_flow_scheduler(name, make, k, shift):
    scheduler = make(shift=shift)
    noise = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(3))
    theirs = stock_loop(scheduler, noise, num_inference_steps=k)
    times = torch.cat([scheduler.timesteps.double().unique().flip(0) / 1000, torch.zeros(1, dtype=F64)])
    ours = SOLVERS[name](NetworkRole(schedule_of(scheduler), "velocity"), noise, times)
    assert (ours - theirs).abs().max() <= 3e-5 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_sde_ddim_equals_the_stock_ddim_with_eta(eta, kind):
    scheduler = DDIMScheduler(**SD15, clip_sample=False, timestep_spacing="trailing", prediction_type=KINDS[kind])
    role, noise = (NetworkRole(schedule_of(scheduler), kind),
                   torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)))
    fresh = lambda i, shape: torch.randn(shape, generator=torch.Generator().manual_seed(10 + i))
    scheduler.set_timesteps(8)
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        raw = role(x, ((t + 1).double() / 1000).expand(2)).raw
        x = scheduler.step(raw, t, x, eta=eta, variance_noise=fresh(i, x.shape), return_dict=False)[0]
    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=F64)])
    assert torch.allclose(sde_ddim(role, noise, times, noise=fresh, eta=eta), x, atol=2e-5)


def test_sde_ddim_reaches_the_variance_with_order_one():
    """On centred Gaussian data the solver is linear, so unit vectors as start and as noises show its variance
    exactly."""
    role = Gaussian(SCHEDULES["trig"], torch.zeros(1, dtype=F64), torch.tensor([0.36], dtype=F64))
    errors = []
    for n in (40, 80, 160, 320):
        unit = torch.eye(n + 1, dtype=F64)
        times = torch.linspace(0.95, 0.05, n + 1, dtype=F64)
        variance_t, variance_r = (role._variances(t[None])[0, 0] for t in (times[0], times[-1]))
        parts = sde_ddim(role, variance_t.sqrt() * unit[:, :1], times,
                         noise=lambda i, shape, unit=unit: unit[:, i + 1:i + 2])
        errors.append(((parts**2).sum() - variance_r).abs().log2())
    assert [float(a - b) for a, b in zip(errors, errors[1:])] == pytest.approx([1, 1, 1], abs=0.15)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_state_is_shown_on_the_way(name):
    """Step by step: what is seen after step i is the end of a solve that stops there."""
    role, x, times = (teachers(SCHEDULES["flow"])["gaussian"], torch.ones(2, 2, dtype=F64),
                      torch.linspace(0.9, 0.1, 5, dtype=F64))
    noise, found = lambda i, shape: torch.full(shape, 0.1 * i, dtype=F64), {}
    end = SOLVERS[name](role, x, times, noise=noise, seen=found.setdefault)
    assert list(found) == [0, 1, 2, 3] and torch.equal(found[3], end)
    for i, state in found.items():
        assert torch.equal(state, SOLVERS[name](role, x, times[:i + 2], noise=noise))


def test_the_end_of_a_stochastic_solver_is_no_function_of_its_start():
    role, x, times = (teachers(SCHEDULES["flow"])["gaussian"], torch.ones(2, 2, dtype=F64),
                      torch.linspace(0.9, 0.1, 5, dtype=F64))
    for name in SOLVERS:
        ends = [SOLVERS[name](role, x, times, noise=lambda i, shape, value=value: torch.full(shape, value, dtype=F64))
                for value in (0.0, 1.0)]
        assert torch.equal(*ends) == (name not in STOCHASTIC)


def test_sde_ddim_needs_its_noise():
    with pytest.raises(ValueError, match="noise"):
        SOLVERS["sde_ddim"](NetworkRole(SCHEDULES["vp"], "eps"), torch.zeros(1, 2), torch.tensor([1.0, 0.5], dtype=F64))


def test_addim_restores_variance_as_the_formula_says():
    """One step 0.8 -> 0.3 on a flow, N(0.7, 0.6^2) in many dimensions: variance 0.129 by DDIM, 0.289 by aDDIM, 0.266
    true."""
    d = 200_000
    role = Gaussian(SCHEDULES["flow"], torch.full((d,), 0.7, dtype=F64), torch.full((d,), 0.36, dtype=F64))
    t, r = torch.tensor([0.8], dtype=F64), torch.tensor([0.3], dtype=F64)
    z = torch.randn(1, d, generator=torch.Generator().manual_seed(0), dtype=F64)
    p = role(0.2 * 0.7 + (0.2**2 * 0.36 + 0.8**2) ** 0.5 * z, t)
    x_var = torch.tensor([0.36 * 0.64 / (0.04 * 0.36 + 0.64)], dtype=F64)           # of x_0 given x_t
    assert ddim_step(p, r).var().item() == pytest.approx(0.129, abs=2e-3)
    assert addim_step(p, r, x_var).var().item() == pytest.approx(0.289, abs=3e-3)
    assert torch.allclose(addim_step(p, r, torch.zeros(1)), ddim_step(p, r))
    times = torch.tensor([0.8, 0.3], dtype=F64)
    guess = torch.tensor([0.1 / (2 + (0.2 / 0.8) ** 2)], dtype=F64)
    assert torch.allclose(SOLVERS["addim"](role, p.x_t, times), addim_step(p, r, guess))
