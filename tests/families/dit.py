"""DiT, whose prompts are classes."""
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from .case import Case

PROMPTS = ("class 3", "tench")


def tiny_dit(sigma: bool = True) -> DiTPipeline:
    """About 70,000 parameters, most of them of classes: 4-channel latents of 8 x 8, 2 pixels a latent."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8
                                        if sigma else 4,
                                        num_layers=3, sample_size=8)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(8, 8),
                        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.18)
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    pipeline = DiTPipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler)
    # as in the index of released ones
    pipeline.register_to_config(id2label={"0": "tench, Tinca tinca", "1": "goldfish"})
    return pipeline


def latents(pipe: DiTPipeline, call: Mapping[str, Any]) -> Tensor:
    """What it decodes, in its own scale: it returns pictures only."""
    seen: list[Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z: seen.append(z * pipe.vae.config.scaling_factor) or decode(z)
    pipe(**call)
    pipe.vae.decode = decode
    return seen[-1]


MADE = {"samples": {"prompts": list(PROMPTS), "steps": 2}, "count": 4, "batch": 2}
CASES = {
    "dit": Case(tiny_dit, sizes=((16, 16), (16, 16)), latents=latents, prompts=PROMPTS, data=MADE,
                methods={"lcm": {}, "dmd2": {"critic_steps": 1, "gan_weight": 0.1}}),
    "dit-eps": Case(lambda: tiny_dit(sigma=False), sizes=((16, 16), (16, 16)), latents=latents, prompts=PROMPTS,
                    data={"prompts": list(PROMPTS), "batch": 2},
                    methods={"dmd2": {"critic_steps": 1, "gan_weight": 0.0}}),
}
