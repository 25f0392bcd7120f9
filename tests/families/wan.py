"""Wan: videos. 2.1, and 2.2 with one network, whose pipeline tells it a time for every token and whose codec is
residual."""
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from .case import Case

WORDS = ("a", "red", "blue", "ring", "square")


def tiny(residual: bool = False) -> WanPipeline:
    """Of about 120,000 parameters. 8 pixels a latent, 16 with `residual`, whose pipeline is that of Wan 2.2; 4 frames a
    latent."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in WORDS)]
    tokenizer = T5TokenizerFast(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1,
                                          num_heads=2))
    channels = 6 if residual else 4
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels, text_dim=16,
        freq_dim=32, ffn_dim=32,
        num_layers=3, rope_max_seq_len=32)
    more = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
            "decoder_base_dim": 8} if residual else {}
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.3, -0.2, 0.5, -0.4, 0.1, 0.2][:channels],
        latents_std=[1.5, 0.7, 2.0, 0.4, 1.2, 0.8][:channels], **more)
    for network in (transformer, vae):                  # no norm is one
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    vae.decoder.conv_out.weight.data *= 0.1             # pixels within the range to which `vae.decode` clips them
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return WanPipeline(tokenizer, encoder.eval(), vae.eval(), scheduler, transformer.eval(), expand_timesteps=residual)


def reconstructed(vae: nn.Module, pixels: Tensor) -> Tensor:
    return vae.decode(vae.encode(pixels.transpose(1, 2)).latent_dist.mode()).sample.transpose(1, 2)


CALL = {"max_sequence_length": 8, "num_frames": 5}
DATA = {"samples": {"prompts": ["a red ring", "a blue square"], "solver": "ddim", "steps": 2}, "count": 4, "batch": 2}
# scm begins at t = 0.999, where no call of this pipeline can.
METHODS = {"lcm": {}, "dmd2": {"critic_steps": 1, "gan_weight": 0.1}}
CASES = {
    "wan": Case(tiny, sizes=((32, 32), (32, 48)), call=CALL | {"height": 32, "width": 32}, reconstructed=reconstructed,
                data=DATA, frames=5, methods=METHODS),
    "wan22-ti2v": Case(lambda: tiny(residual=True), sizes=((64, 64), (64, 96)), call=CALL | {"height": 64, "width": 64},
                       reconstructed=reconstructed, data=DATA, frames=5, methods=METHODS),
}
