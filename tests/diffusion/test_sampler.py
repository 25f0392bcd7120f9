"""The sampler equals the stock scheduler's loop on the same network and the same noise."""
from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from stepdistill.diffusion.sampler import Sampler
from stepdistill.diffusion.schedule import RectifiedFlow, VariancePreserving

from .stock import KINDS, SD15, NetworkRole, schedule_of, stock_loop

SHAPE = (3, 4, 6, 5)
STEPS = (1, 2, 3, 4, 7, 8, 25)


def compare(scheduler, k: int, kind: str, digits: float = 3e-5, **call) -> None:
    """Against the stock loop, which works in float32 on states that grow to 45 times a sample's size."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    stream = torch.Generator().manual_seed(7)
    schedule = schedule_of(scheduler)
    sampler = Sampler.of(scheduler, k, schedule, **call)
    ours = sampler(NetworkRole(schedule, kind), noise, None, lambda i: torch.randn(SHAPE, generator=stream))
    stochastic = torch.Generator().manual_seed(7) if sampler.stochastic else None
    theirs = stock_loop(scheduler, noise, stochastic,
                        **({} if call.keys() & {"timesteps", "sigmas"} else {"num_inference_steps": k}), **call)
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= digits * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim(kind, k, spacing, to_one):
    compare(DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=to_one, timestep_spacing=spacing,
                          prediction_type=KINDS[kind]), k, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("make", [EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_sigma_schedulers(make, kind, k, spacing, karras):
    if karras and k == 1 and make is not EulerDiscreteScheduler:
        pytest.skip("the stock Karras grid of one step is degenerate")
    compare(make(**SD15, timestep_spacing=spacing, prediction_type=KINDS[kind], use_karras_sigmas=karras), k, kind)


@pytest.mark.parametrize("k", [1, 2, 4, 8, 25])
def test_zero_terminal_snr(k):
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    compare(DDIMScheduler(**SD15, **more, clip_sample=False), k, "v")
    compare(EulerDiscreteScheduler(**SD15, **more), k, "v", digits=2e-3)          # its state grows to 4096


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("original", [50, 25, 1000])
def test_lcm(kind, k, original):
    compare(LCMScheduler(**SD15, original_inference_steps=original, prediction_type=KINDS[kind]), k, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("eta", [0.0, 0.2, 0.3, 1.0])
def test_tcd(kind, k, eta):
    scheduler = TCDScheduler(**SD15, prediction_type=KINDS[kind])
    compare(scheduler, k, kind, eta=eta)
    assert Sampler.of(scheduler, k, schedule_of(scheduler), eta=eta).stochastic == (k > 1 and eta > 0)


def test_tcd_with_other_grids_and_without_eta():
    compare(TCDScheduler(**SD15), 3, "eps", timesteps=[999, 500, 3], eta=0.7)
    scheduler = TCDScheduler(**SD15, original_inference_steps=8)
    compare(scheduler, 8, "eps", eta=0.5)
    noise, schedule = torch.ones(2, 5), schedule_of(scheduler)
    role = NetworkRole(schedule, "eps")
    silent, zero = (Sampler.of(scheduler, 4, schedule, **call)(role, noise) for call in ({}, {"eta": 0.0}))
    assert torch.equal(silent, zero)                                     # as the pipelines have it


def test_lcm_with_its_own_timesteps_and_truncated_betas():
    compare(LCMScheduler(**SD15), 4, "eps", timesteps=[999, 749, 499, 249])
    whole = LCMScheduler(**SD15)
    short = LCMScheduler(trained_betas=whole.betas[:400].tolist(), num_train_timesteps=400, original_inference_steps=4)
    sampler = Sampler.of(short, 1, VariancePreserving.of(whole.alphas_cumprod))
    assert (sampler.times.tolist() == pytest.approx([0.4]) and sampler.evaluations[0].level
            == pytest.approx(0.4, abs=1e-6))


@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_euler(k, shift, stochastic):
    make = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic)
    compare(make, k, "velocity")
    compare(make, k, "velocity", sigmas=torch.linspace(1, 1 / k, k).tolist())


@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_lcm(k, shift):
    make = FlowMatchLCMScheduler(shift=shift)
    compare(make, k, "velocity")
    compare(make, k, "velocity", sigmas=torch.linspace(1, 1 / k, k).tolist())
    assert Sampler.of(make, k, RectifiedFlow()).stochastic == (k > 1)


def test_grids_are_those_of_the_recipes():
    schedule = VariancePreserving.of(LCMScheduler(**SD15).alphas_cumprod)
    timesteps = lambda scheduler, k, **call: (1000 * Sampler.of(scheduler, k, schedule, **call).times
                                              - 1).round().int().tolist()
    assert timesteps(LCMScheduler(**SD15), 4) == [999, 759, 499, 259]
    assert timesteps(LCMScheduler(**SD15, original_inference_steps=4), 4) == [999, 749, 499, 249]
    assert timesteps(LCMScheduler(**SD15), 4, original_inference_steps=4) == [999, 749, 499, 249]
    assert timesteps(DDIMScheduler(**SD15, clip_sample=False, timestep_spacing="trailing"), 4) == [999, 749, 499, 249]
    assert (Sampler.of(EulerDiscreteScheduler(**SD15, timestep_spacing="trailing"), 4, schedule).start
            == pytest.approx(0.9977, abs=5e-5))
    assert Sampler.of(HeunDiscreteScheduler(**SD15), 5, schedule).nfe == 9


def test_rollout_stops_before_an_evaluation_and_shares_the_way():
    scheduler = LCMScheduler(**SD15)
    role = NetworkRole(schedule_of(scheduler), "eps")
    sampler = Sampler.of(scheduler, 4, role.schedule)
    noise, draw = torch.ones(2, 5), lambda i: torch.full((2, 5), 0.1 * (i + 1))
    assert torch.equal(sampler.rollout(role, noise, 0, None, draw), noise)
    x = sampler.rollout(role, noise, 2, None, draw)
    p = role(x, sampler.times[2].expand(2))
    x0 = p.x0                                                           # the boundary scalings are 1e-8 here
    again = role.schedule.add_noise(x0, draw(2), sampler.times[3].expand(2))
    assert torch.allclose(sampler.rollout(role, noise, 3, None, draw), again, atol=1e-5)


def test_the_scheduler_is_left_as_it_was():
    scheduler = DDIMScheduler(**SD15, clip_sample=False)
    before = scheduler.timesteps.clone()
    Sampler.of(scheduler, 4, schedule_of(scheduler))
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None


@pytest.mark.parametrize("scheduler, k, says", [
    (DDIMScheduler(**SD15), 4, "clip_sample"),
    (LCMScheduler(**SD15, original_inference_steps=4), 5, "does not serve"),
    (LCMScheduler(**SD15), 0, "at least 1 step"),
    (DDIMScheduler(**SD15, clip_sample=False), 1000, "steps_offset"),
    (DDIMScheduler(**SD15, clip_sample=False, timestep_spacing="trailing"), 61, "another number of steps"),
    (EulerAncestralDiscreteScheduler(**SD15), 4, "EulerDiscreteScheduler"),
    (DPMSolverMultistepScheduler(**SD15, algorithm_type="sde-dpmsolver++"), 4, "algorithm_type"),
    (FlowMatchEulerDiscreteScheduler(), 4, "rectified flows"),
    (FlowMatchLCMScheduler(), 4, "rectified flows"),
    (FlowMatchLCMScheduler(scale_factors=[0.5, 1.0, 1.0]), 4, "scale_factors"),
    (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4, "mu"),
])
def test_refusals_teach(scheduler, k, says):
    with pytest.raises(ValueError, match=says):
        Sampler.of(scheduler, k, VariancePreserving.of(LCMScheduler(**SD15).alphas_cumprod))


def test_a_vp_scheduler_refuses_a_flow_and_a_stochastic_sampler_needs_noise():
    with pytest.raises(ValueError, match="viewed"):
        Sampler.of(LCMScheduler(**SD15), 4, RectifiedFlow())
    for scheduler, eta in ((DDIMScheduler(**SD15, clip_sample=False), 0.5), (TCDScheduler(**SD15), 1.1)):
        with pytest.raises(ValueError, match=f"eta.*TCDScheduler alone.*{eta:g} with a {type(scheduler).__name__}"):
            Sampler.of(scheduler, 4, schedule_of(scheduler), eta=eta)
    with pytest.raises(ValueError, match="4.*sigmas|sigmas.*4"):
        Sampler.of(FlowMatchEulerDiscreteScheduler(), 4, RectifiedFlow(), sigmas=[1.0, 0.5])
    scheduler = LCMScheduler(**SD15)
    with pytest.raises(ValueError, match="stochastic"):
        Sampler.of(scheduler, 2, schedule_of(scheduler))(NetworkRole(schedule_of(scheduler), "eps"), torch.ones(1, 2))
