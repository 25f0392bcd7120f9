"""Z-Image: captions and pictures in lists, with learned tokens where either is no multiple of 32 tokens long."""
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny import qwen_tokenizer
from transformers import Qwen3Config, Qwen3Model

from .case import Case

TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny() -> ZImagePipeline:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(TEMPLATE)
    text = Qwen3Model(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64))
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=(4, 6, 6), axes_lens=(96, 32, 32))
    for parameter in transformer.parameters():          # no token of padding is zero, and no norm is one
        parameter.data += 0.1 * torch.randn_like(parameter)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                        sample_size=16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False,
                        use_post_quant_conv=False)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae.eval(), text.eval(), tokenizer,
                          transformer.eval())


# 16 x 16 pixels are 16 tokens, 16 x 32 are 32. A call that names no size draws 1024 x 1024, of 65,536 here.
CALL = {"max_sequence_length": 40, "height": 16, "width": 16}
CASES = {"z-image": Case(tiny, sizes=((16, 16), (16, 32)), call=CALL)}
