"""EDM's networks under a noise of norm 1: closed forms, and the loop of stock pipelines by their schedulers."""
from __future__ import annotations

from dataclasses import dataclass
from math import atan, log

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDPMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from torch import Tensor

from stepdistill.diffusion.consistency import SIGMA_MIN, consistency, origin
from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.prediction import Prediction, truth
from stepdistill.diffusion.sampler import Sampler
from stepdistill.diffusion.schedule import Schedule, TrigFlow, VarianceExploding, VariancePreserving, like
from stepdistill.methods.base import Inference
from stepdistill.models.schedulers import stock_call, stock_scheduler

from .stock import network

SIGMA_MAX, DATA = 80.0, 0.5
EDM = TrigFlow(atan(SIGMA_MAX))


def test_time_is_the_angle_up_to_the_most_noise_that_is_known():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    ratio = EDM.sigma(t) / EDM.alpha(t)
    torch.testing.assert_close(ratio, torch.tensor([0.0, torch.tensor(atan(80) / 4).tan().item(), 80.0],
                                                   dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(EDM.alpha(t) ** 2 + EDM.sigma(t) ** 2, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(EDM.time_at(EDM.angle(t)), t)
    assert EDM.time_at(torch.tensor([1.57], dtype=torch.float64)).item() == 1.0
    h = 1e-6
    inner = t[1:2]
    for value, slope in ((EDM.alpha, EDM.d_alpha), (EDM.sigma, EDM.d_sigma)):
        torch.testing.assert_close((value(inner + h) - value(inner - h)) / (2 * h), slope(inner), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", [EDM, VarianceExploding(SIGMA_MAX)])
def test_what_the_network_gives_is_of_x_over_alpha(schedule):
    """Karras et al. 2022, table 1: D(x) = c_skip x + c_out F, and the target is x_0; it is regular at both ends."""
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    sigma = like(schedule.sigma(t) / schedule.alpha(t), x0)
    x = x0 + sigma * eps
    total = sigma**2 + DATA**2
    raw = truth(x0, eps, t, schedule, "edm")
    torch.testing.assert_close(DATA**2 / total * x + sigma * DATA / total.sqrt() * raw, x0)
    p = Prediction(raw, schedule.add_noise(x0, eps, t), t, schedule, "edm")
    torch.testing.assert_close(p.x0, x0)
    torch.testing.assert_close(p.eps, eps, rtol=1e-6, atol=1e-6)


def test_the_consistency_function_is_song_s():
    """arXiv:2303.01469, appendix C; at sigma_min, and below, it is x."""
    t = torch.cat([torch.tensor([origin(EDM), origin(EDM) / 2]), torch.tensor([0.01, 0.4, 1.0])]).double()
    x0, eps = torch.randn(2, 5, 4, dtype=torch.float64)
    sigma = like(EDM.angle(t).tan(), x0)
    x, raw = x0 + sigma * eps, torch.randn(5, 4, dtype=torch.float64)
    skip = DATA**2 / ((sigma - SIGMA_MIN) ** 2 + DATA**2)
    out = (sigma - SIGMA_MIN) * DATA / (sigma**2 + DATA**2).sqrt()
    found = consistency(Prediction(raw, EDM.add_noise(x0, eps, t), t, EDM, "edm"))
    torch.testing.assert_close(found[2:], (skip * x + out * raw)[2:])
    torch.testing.assert_close(found[:2], x[:2])


@dataclass(frozen=True)
class ByClock:
    """`network` as a stock pipeline calls it with a scheduler that scales. clock: of ln sigma."""

    clock: float
    schedule: Schedule = EDM

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        sigma = self.schedule.angle(t).tan()
        x = x_t / like(self.schedule.alpha(t), x_t)
        return Prediction(network(x / like((sigma**2 + DATA**2).sqrt(), x), self.clock * sigma.log()), x_t, t,
                          self.schedule, "edm")


def stock_loop(scheduler, noise: Tensor, seed: int, **grid) -> Tensor:
    scheduler.set_timesteps(**grid)
    generator, x = torch.Generator().manual_seed(seed), noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(seen, t.expand(len(x))), t, x, generator=generator, return_dict=False)[0]
    return x


def ours(sampler: Sampler, role, noise: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sampler(role, noise, draw=lambda i: torch.randn(noise.shape, generator=generator))


CM = [{}, {"clip_denoised": False, "num_train_timesteps": 18, "sigma_max": 40.0, "sigma_min": 0.01}]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("config", CM)
def test_consistency_models_are_sampled_as_the_stock_scheduler_does(k, config):
    scheduler, noise = CMStochasticIterativeScheduler(**config), torch.randn(2, 3, 8)
    schedule = TrigFlow(atan(scheduler.config.sigma_max))
    theirs = stock_loop(scheduler, noise, 1, num_inference_steps=k)
    torch.testing.assert_close(ours(Sampler.of(scheduler, k, schedule), ByClock(250.0, schedule), noise, 1), theirs,
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), EDMEulerScheduler(sigma_schedule="exponential"),
                                       EDMDPMSolverMultistepScheduler()])
def test_edm_is_sampled_as_the_stock_schedulers_do(k, scheduler):
    noise = torch.randn(2, 3, 8)
    theirs = stock_loop(scheduler, noise, 1, num_inference_steps=k)
    torch.testing.assert_close(ours(Sampler.of(scheduler, k, EDM), ByClock(0.25), noise, 1), theirs,
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [{}, {"clip_sample": False, "variance_type": "fixed_large"},
                                    {"timestep_spacing": "trailing"},
                                    {"prediction_type": "v_prediction", "timestep_spacing": "linspace",
                                     "clip_sample_range": 0.5}])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_ddpm_is_sampled_as_the_stock_scheduler_does(k, config):
    scheduler, noise = DDPMScheduler(**config), torch.randn(2, 3, 8)
    kind = {"epsilon": "eps", "v_prediction": "v"}[scheduler.config.prediction_type]
    schedule = VariancePreserving.of(scheduler.alphas_cumprod)

    def role(x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        return Prediction(network(x_t, 1000 * t - 1), x_t, t, schedule, kind)

    theirs = stock_loop(scheduler, noise, 1, num_inference_steps=k)
    torch.testing.assert_close(ours(Sampler.of(scheduler, k, schedule), role, noise, 1), theirs, rtol=1e-4, atol=1e-4)


# -- how students leave ------------------------------------------------------------------------------------------------

def sampler_of(inference: Inference, own) -> tuple[Sampler, dict]:
    found = stock_call(inference, EDM, own=own)
    scheduler = stock_scheduler(found.scheduler, found.config, own)
    return Sampler.of_call(scheduler, inference.steps, EDM, found.call), dict(found.call)


@pytest.mark.parametrize("steps, nodes", [(1, None), (2, None), (4, None), (3, 50), (8, 10)])
def test_students_of_consistency_models_are_asked_at_the_times_of_their_training(steps, nodes):
    sampler, call = sampler_of(Inference(steps, noise=1.0, nodes=nodes),
                               CMStochasticIterativeScheduler(num_train_timesteps=18))
    count = nodes or steps
    wanted = torch.tensor([(count - count * i // steps) / count if nodes else 1 - i / steps for i in range(steps)],
                          dtype=torch.float64)
    torch.testing.assert_close(EDM.angle(sampler.times).tan().log(), EDM.angle(wanted).tan().log(), rtol=0, atol=1e-4)
    assert sampler.times[0] == 1 and sampler.start == pytest.approx(SIGMA_MAX / (SIGMA_MAX**2 + 1) ** 0.5)
    assert call["timesteps"] == sorted(call["timesteps"], reverse=True) and sampler.stochastic == (steps > 1)


@pytest.mark.parametrize("steps", [1, 2])
def test_students_of_edm_take_even_steps(steps):
    sampler, call = sampler_of(Inference(steps), EDMDPMSolverMultistepScheduler())
    torch.testing.assert_close(sampler.times, torch.tensor([1.0, 0.5][:steps], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(sampler.landings, torch.tensor([0.5, 0.0][-steps:], dtype=torch.float64),
                               rtol=0, atol=1e-6)
    assert sampler.start == pytest.approx(1.0) and call == {"num_inference_steps": steps, "guidance_scale": 1.0}


@pytest.mark.parametrize("inference, own, reason", [
    (Inference(2), CMStochasticIterativeScheduler(), "adds fresh noise in each step"),
    (Inference(2, noise=1.0), EDMEulerScheduler(), "none adds fresh noise"),
    (Inference(4), EDMEulerScheduler(), "where they are 1 or 2"),
    (Inference(1, end=0.001), EDMEulerScheduler(), "end on the data"),
    (Inference(2), None, "no stock scheduler samples on a TrigFlow")])
def test_what_no_stock_scheduler_does(inference, own, reason):
    with pytest.raises(ValueError, match=reason):
        stock_call(inference, EDM, own=own)


def test_the_least_noise_is_a_time():
    assert (EDM.angle(torch.tensor([origin(EDM)], dtype=torch.float64)).tan().log().item()
            == pytest.approx(log(SIGMA_MIN)))
