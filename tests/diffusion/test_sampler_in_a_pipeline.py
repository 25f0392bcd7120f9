"""The sampler gives what a real StableDiffusionPipeline gives: guidance, the order of its draws and its clock
included."""
from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.sampler import Sampler
from stepdistill.diffusion.schedule import VariancePreserving
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline("v_prediction")


SCHEDULERS = [LCMScheduler, DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler]


@pytest.mark.parametrize("make, own_call", [*((make, {}) for make in SCHEDULERS),
                                            *((TCDScheduler, {"eta": eta}) for eta in (0.0, 0.3, 1.0)),
                                        (TCDScheduler, {})])
@pytest.mark.parametrize("w", [1.0, 3.0])
@torch.no_grad()
def test_the_same_latents_as_the_pipeline(pipeline, make, own_call, w):
    prompts = ["a red ring", "a blue cross on navy"]
    text, null = pipeline.encode_prompt(prompts, "cpu", 1, True)
    schedule = VariancePreserving.of(pipeline.scheduler.alphas_cumprod)

    class Denoiser:
        def __init__(self):
            self.schedule = schedule

        def __call__(self, x_t, t, cond):
            return Prediction(pipeline.unet(x_t, (1000 * t - 1).round(), cond.text).sample, x_t, t, schedule, "v")

    pipeline.scheduler = make.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    stream = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 4, "guidance_scale": w, **own_call}
    theirs = pipeline(prompts, generator=stream, output_type="latent", **call).images
    stream = torch.Generator().manual_seed(0)
    noise = torch.randn(theirs.shape, generator=stream)
    ours = Sampler.of_call(pipeline.scheduler, 4, schedule, call)(
        guided(Denoiser(), w), noise, Condition(text=text, null=Condition(text=null)),
        lambda i: torch.randn(theirs.shape, generator=stream))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
