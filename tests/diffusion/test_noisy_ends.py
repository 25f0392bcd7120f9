"""Schedules that end near alpha = 0: every solver stays close to the ODE there."""
from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from stepdistill.diffusion.bridges import bridge
from stepdistill.diffusion.exact import GaussianMixture
from stepdistill.diffusion.flow_map import ddim_step
from stepdistill.diffusion.schedule import TrigFlow, VariancePreserving
from stepdistill.diffusion.solvers import SOLVERS, STOCHASTIC, ddim, heun, heun_step, long_step

from .schedules import ALPHAS_CUMPROD, SCHEDULES, zero_terminal_snr

F64 = torch.float64


def vp(**config) -> VariancePreserving:
    return VariancePreserving.of(DDIMScheduler(**config).alphas_cumprod.double())


NOISY = {"zero terminal SNR": zero_terminal_snr(),
         "rescaled": vp(beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
         "2^-24": VariancePreserving.of(torch.cat([ALPHAS_CUMPROD[:-1], torch.tensor([2.0**-24], dtype=F64)])),
         "cosine": vp(beta_schedule="squaredcos_cap_v2"), "linear": vp(beta_schedule="linear"), "trig": TrigFlow()}


def mixture(schedule) -> GaussianMixture:
    return GaussianMixture.of(schedule, torch.tensor([0.4, 0.6]), torch.tensor([[-0.9], [0.7]]),
                              torch.tensor([0.5, 0.35]))


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in (*STOCHASTIC, "addim", "ddim", "euler")])
@pytest.mark.parametrize("schedule", NOISY)
@pytest.mark.parametrize("steps", [8, 20, 50])
def test_no_solver_is_worse_than_ddim_from_the_very_end(name, schedule, steps):
    role = mixture(NOISY[schedule])
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    fine = ddim(role, x, torch.linspace(1, 0, 1001, dtype=F64))
    times = torch.linspace(1, 0, steps + 1, dtype=F64)
    error, usual = ((solver(role, x, times) - fine).abs().mean().item() for solver in (SOLVERS[name], ddim))
    assert error <= 1.05 * usual, (error, usual)


@pytest.mark.parametrize("schedule", NOISY)
def test_the_rule_itself_gives_way_and_leaves_finite_gradients(schedule):
    s = NOISY[schedule]
    role, t, r = mixture(s), torch.ones(2, dtype=F64), torch.tensor([0.7, 0.5], dtype=F64)
    x = torch.tensor([[0.3], [-1.2]], dtype=F64, requires_grad=True)
    here = role(x, t)
    step = heun_step(here, role(ddim_step(here, r), r))
    assert torch.equal(long_step(s, t, r), torch.tensor([True, True])) and torch.equal(step, ddim_step(here, r))
    assert torch.autograd.grad(step.sum(), x)[0].isfinite().all()
    assert torch.equal(bridge(heun, role, x, t, r, None), step)


def test_stable_diffusion_s_steps_are_heun_s_as_in_the_stock_scheduler():
    one = torch.ones(3, dtype=F64)
    assert not long_step(SCHEDULES["vp"], one, torch.tensor([0.9, 0.5, 0.01], dtype=F64)).any()
    assert not long_step(SCHEDULES["flow"], one, torch.tensor([0.9, 0.5, 0.01], dtype=F64)).any()
