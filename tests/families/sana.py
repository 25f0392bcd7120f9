"""Sana, under the scheduler of flow matching and under the solver that its released pipelines come with."""
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from .case import Case

SOLVER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def tiny_sana(solver: bool = False, scale: float = 1.0, sigma: bool = False) -> SanaPipeline:
    """About 45,000 parameters: 4-channel latents of 16 x 16, 2 pixels a latent. sigma: its network has learned a
    variance."""
    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz", "\u2581"]
    tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)})
    encoder = Gemma2Model(Gemma2Config(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                       num_attention_heads=2, num_key_value_heads=1, head_dim=8))
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=8 if sigma else 4, num_attention_heads=2, attention_head_dim=8, num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=16, timestep_scale=scale)
    vae = AutoencoderDC(latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                        attention_head_dim=4,
                        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
                        encoder_qkv_multiscales=((), ()),
                        decoder_qkv_multiscales=((), ()), scaling_factor=0.41)
    scheduler = DPMSolverMultistepScheduler(**SOLVER) if solver else FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(tokenizer=tokenizer, text_encoder=encoder.eval(), vae=vae.eval(),
                        transformer=transformer.eval(), scheduler=scheduler)


def reconstructed(vae: nn.Module, pixels: Tensor) -> Tensor:
    return vae.decode(vae.encode(pixels).latent).sample


CASES = {
    "sana": Case(tiny_sana, sizes=((32, 32), (32, 64)), call={"max_sequence_length": 12}, reconstructed=reconstructed),
    "sana-solver": Case(lambda: tiny_sana(solver=True, scale=0.5, sigma=True), sizes=((32, 32), (64, 32)),
                        call={"max_sequence_length": 10, "complex_human_instruction": ["Draw", "this: "]},
                        reconstructed=reconstructed),
}
