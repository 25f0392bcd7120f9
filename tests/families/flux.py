"""FLUX.1: a network that reads its guidance scale, and one that is guided by two calls."""
from functools import partial

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny import ASSETS
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from .case import Case


def tiny_flux(guidance_embeds: bool) -> FluxPipeline:
    """Of 4-channel latents of 2 pixels, with two blocks of each kind and the released scheduler's dynamic shift."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "shapes-clip")
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    words = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581red", "\u2581blue", "\u2581ring", "\u2581square"]
    t5_tokenizer = T5TokenizerFast(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0,
                                   model_max_length=16)
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6))
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                        sample_size=16,
                        scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
                                                base_image_seq_len=256, max_image_seq_len=4096)
    networks = [lively(network) for network in (transformer, vae, clip, t5)]
    return FluxPipeline(scheduler, networks[1], networks[2], tokenizer, networks[3], t5_tokenizer, networks[0])


def lively(network: nn.Module) -> nn.Module:
    """With scales and biases that are not ones and zeros."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return network.eval()


def unpacked(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Tokens of 2 x 2 latents (B, N, 4 C), channels first, as (B, C, H, W)."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (shape[2] // 2, shape[3] // 2)), 2)


FLUX = partial(Case, sizes=((16, 16), (16, 24)), call={"max_sequence_length": 6, "height": 16, "width": 16},
               unpacked=unpacked)
CASES = {
    "flux-dev": FLUX(partial(tiny_flux, guidance_embeds=True)),
    "flux-cfg": FLUX(partial(tiny_flux, guidance_embeds=False)),
}
