"""PixArt-Sigma, and PixArt-Alpha with sizes that its network is told and without."""
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from .case import Case

NOISE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def tiny_pixart(cls: type[DiffusionPipeline], side: int, patch: int, sigma: bool = True) -> DiffusionPipeline:
    """About 40,000 parameters: 4-channel latents of `side`, 2 pixels a latent. sigma: its network has learned a
    variance."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581red", "\u2581blue", "\u2581ring", "\u2581square"]
    tokenizer = T5TokenizerFast(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0,
                                model_max_length=16)
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1,
                                      num_heads=2)).eval()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8 if sigma else 4, num_layers=3,
        cross_attention_dim=24,
        caption_channels=16, sample_size=side, patch_size=patch)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(8, 8),
                        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=2 * side,
                        scaling_factor=0.13)
    scheduler = DPMSolverMultistepScheduler(**NOISE) if sigma else DDIMScheduler(**NOISE, clip_sample=False,
                                                                                 timestep_spacing="trailing")
    return cls(tokenizer=tokenizer, text_encoder=encoder, vae=vae.eval(), transformer=transformer.eval(),
               scheduler=scheduler)


def latents(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Tensor:
    """These pipelines have no callback that is shown them."""
    return pipe(**call, output_type="latent").images


CASES = {
    "pixart-sigma": Case(lambda: tiny_pixart(PixArtSigmaPipeline, 8, 2), sizes=((16, 16), (16, 32)),
                         call={"max_sequence_length": 6},
                         latents=latents),
    "pixart-alpha": Case(lambda: tiny_pixart(PixArtAlphaPipeline, 128, 8), sizes=((16, 16), (32, 16)),
                         call={"max_sequence_length": 5},
                         latents=latents),
    "pixart-alpha-512": Case(lambda: tiny_pixart(PixArtAlphaPipeline, 8, 2, sigma=False), sizes=((16, 16), (16, 32)),
                             latents=latents),
}
