"""Qwen-Image: tokens of 2 x 2 latents, captions of different length, and a codec of videos."""
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tiny import qwen_tokenizer
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .case import Case

# What the pipeline puts before a prompt. With a token a word it has the 34 tokens that the pipeline drops.
BEFORE = ("system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
          "relationships of the objects and background:\nuser\nassistant")


def tiny() -> QwenImagePipeline:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(words=BEFORE)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": None,
            "eos_token_id": None, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
              "patch_size": 2, "fullatt_block_indexes": [0]}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6))
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.3, -0.2, 0.5, -0.4], latents_std=[1.5, 0.7, 2.0, 0.4])
    for network in (transformer, vae):                  # no norm is one
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    vae.decoder.conv_out.weight.data *= 0.3             # pixels within the range to which `vae.decode` clips them
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    return QwenImagePipeline(scheduler, vae.eval(), encoder.eval(), tokenizer, transformer.eval())


def unpacked(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (shape[2] // 2, shape[3] // 2)), 2)


def reconstructed(vae: nn.Module, pixels: Tensor) -> Tensor:
    return vae.decode(vae.encode(pixels[:, :, None]).latent_dist.mode()).sample[:, :, 0]


# A call that names no size draws 128 x 128 latents, of 4,096 tokens.
CALL = {"max_sequence_length": 40, "height": 32, "width": 32}
STILL = tuple(f"transformer_blocks.2.{part}" for part in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"))
CASES = {"qwen-image": Case(tiny, sizes=((32, 32), (32, 48)), call=CALL, unpacked=unpacked, reconstructed=reconstructed,
                            still=STILL)}
