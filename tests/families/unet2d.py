"""UNet2DModel on pixels: without a prompt, and with classes."""
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from torch import Tensor, nn

from .case import Case


def tiny_unet(size: int | tuple[int, int] = 16, classes: int | None = None, **config: Any) -> UNet2DModel:
    """About 80,000 parameters, with attention at the lower of two resolutions."""
    torch.manual_seed(0)
    return UNet2DModel(sample_size=size, block_out_channels=(16, 32),
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=8,
                       num_class_embeds=classes, **config).eval()


def ddpm(size: int | tuple[int, int] = 16, classes: int | None = None, **scheduler: Any) -> DDPMPipeline:
    return DDPMPipeline(tiny_unet(size, classes), DDPMScheduler(**scheduler))


def ddim() -> DDIMPipeline:
    return DDIMPipeline(tiny_unet(), DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2",
                                                   prediction_type="v_prediction"))


def latents(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Tensor:
    """What the last step gives: its pictures before they are clipped."""
    seen: list[Tensor] = []
    step = pipe.scheduler.step

    def keep(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        seen.append(found[0])
        return found

    pipe.scheduler.step = keep
    pipe(**call)
    pipe.scheduler.step = step
    return seen[-1]


def as_they_are(codec: nn.Module | None, pixels: Tensor) -> Tensor:
    return pixels


METHODS = {"lcm": {}, "dmd2": {"critic_steps": 1, "gan_weight": 0.1}, "progressive": {}}
def edm(scheduler: SchedulerMixin, classes: int | None = None) -> ConsistencyModelPipeline:
    return ConsistencyModelPipeline(tiny_unet(classes=classes), scheduler)


MADE = {"samples": {"prompts": ["class 1", "class 3"], "steps": 2}, "count": 4, "batch": 2}
PLAIN: dict[str, Any] = {"latents": latents, "reconstructed": as_they_are, "scales": (1.0,), "guidance": 1.0}
CASES = {
    "ddpm": Case(ddpm, sizes=((16, 16), (16, 16)), prompts=("", ""), ignored=("label",), methods=METHODS, **PLAIN),
    "ddpm-large": Case(lambda: ddpm((8, 24), variance_type="fixed_large", clip_sample=False,
                                    timestep_spacing="trailing", prediction_type="sample"),
                       sizes=((8, 24), (8, 24)), prompts=("", ""), ignored=("label",), methods={"sid": {}},
                       data={"prompts": "none", "batch": 2}, **PLAIN),
    "ddim": Case(ddim, sizes=((16, 16), (16, 16)), prompts=("", ""), ignored=("label",), methods={"cd": {}},
                 data={"samples": {"prompts": "none", "steps": 2}, "count": 4, "batch": 2}, **PLAIN),
    "ddpm-class": Case(lambda: ddpm(classes=5), sizes=((16, 16), (16, 16)), prompts=("class 3", "class 0"), data=MADE,
                       methods=METHODS | {"scm": {}, "cd": {}}, **PLAIN),
    "cm-class": Case(lambda: edm(CMStochasticIterativeScheduler(), 5), sizes=((16, 16), (16, 16)),
                     prompts=("class 3", "class 0"), data=MADE,
                     methods={"lcm": {}, "dmd2": {"critic_steps": 1, "gan_weight": 0.1}, "scm": {}, "cd": {}}, **PLAIN),
    "cm": Case(lambda: edm(CMStochasticIterativeScheduler(num_train_timesteps=18, clip_denoised=False, sigma_max=60.0)),
               sizes=((16, 16), (16, 16)),
               prompts=("", ""), ignored=("label",), methods={"lcm": {}}, **PLAIN),
    "edm-unet": Case(lambda: edm(EDMEulerScheduler()), sizes=((16, 16), (16, 16)), prompts=("", ""), ignored=("label",),
                     methods={"progressive": {}}, **PLAIN),
    "edm-unet-2m": Case(lambda: edm(EDMDPMSolverMultistepScheduler(), 5), sizes=((16, 16), (16, 16)),
                        prompts=("class 3", "class 0"), data=MADE,
                        methods={"progressive": {}}, **PLAIN),
}
