"""FLUX.2: latents folded into channels under running statistics, and a text of several layers; dev's network reads a
guidance scale."""
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.functional import batch_norm, pixel_shuffle, pixel_unshuffle
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .case import Case
from .flux import lively

TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt and not enable_thinking %}<|im_start|>.{% endif %}")


MISTRAL = ("{% for message in messages %}<|im_start|>{{ message.content[0].text }}{% endfor %}<|im_end|>")
SIZES = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}


def tokenizer(template: str, **more: str) -> Qwen2TokenizerFast:
    return Qwen2TokenizerFast({byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, [],
                              chat_template=template, additional_special_tokens=["<|im_start|>", "<|im_end|>"], **more)


def networks(text: nn.Module, guidance_embeds: bool) -> list[nn.Module]:
    """Of 16-channel latents of 4 pixels, with two blocks of each kind and a codec whose statistics are far from 0 and
    1."""
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds)
    vae = AutoencoderKLFlux2(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                             block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                             sample_size=16,
                             batch_norm_eps=0.01)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.1, 4)
    return [lively(network) for network in (vae, text, transformer)]


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def tiny_klein() -> Flux2KleinPipeline:
    torch.manual_seed(0)
    vae, text, transformer = networks(Qwen3ForCausalLM(Qwen3Config(**SIZES)), guidance_embeds=False)
    return Flux2KleinPipeline(scheduler(), vae, text, tokenizer(TEMPLATE), transformer)


def tiny_dev() -> Flux2Pipeline:
    """Its tokenizer stands where the released one has a processor: a call of prompts asks both the same."""
    torch.manual_seed(0)
    seeing = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "head_dim": 8, "image_size": 16, "patch_size": 8}
    text = Mistral3ForConditionalGeneration(Mistral3Config(text_config={"model_type": "mistral", **SIZES},
                                                           vision_config=seeing, image_token_index=3))
    vae, text, transformer = networks(text, guidance_embeds=True)
    return Flux2Pipeline(scheduler(), vae, text, tokenizer(MISTRAL, padding_side="left"), transformer)


def unpacked(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, shape[2:])


def reconstructed(vae: nn.Module, pixels: Tensor) -> Tensor:
    """There by the statistics in their own words, a normalisation in evaluation mode, and back."""
    z = pixel_unshuffle(vae.encode(pixels).latent_dist.mode(), 2)
    mean, var, eps = vae.bn.running_mean, vae.bn.running_var, vae.config.batch_norm_eps
    normal = batch_norm(z, mean, var, eps=eps)
    return vae.decode(pixel_shuffle(normal * (var + eps).sqrt()[:, None, None] + mean[:, None, None], 2)).sample


CALL = {"max_sequence_length": 24, "text_encoder_out_layers": [1, 2, 4], "height": 16, "width": 16}
CASES = {"flux2-klein": Case(tiny_klein, sizes=((16, 16), (16, 24)), call=CALL, unpacked=unpacked,
                             reconstructed=reconstructed),
         # a prompt follows the 230 bytes of a system's message
         "flux2-dev": Case(tiny_dev, sizes=((16, 16), (16, 24)), call=CALL | {"max_sequence_length": 256},
                           unpacked=unpacked, reconstructed=reconstructed)}
