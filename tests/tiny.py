"""Real pipelines of tiny networks with random weights, for tests that need a pipeline but not its pictures."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from stepdistill.models.sources import FusedLora

ASSETS = Path(__file__).parents[1] / "assets"


def tiny_pipeline(prediction_type: str = "epsilon", seed: int = 0, sample_size: int = 8) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of about 200,000 parameters: 4-channel latents of `sample_size`, 2 pixels a latent."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "shapes-clip")
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=sample_size, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                        sample_size=2 * sample_size)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=True, steps_offset=1, prediction_type=prediction_type,
                              timestep_spacing="trailing")
    pipeline = StableDiffusionPipeline(vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, unet=unet.eval(),
                                       scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                       requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny(folder: Path, prediction_type: str = "epsilon") -> Path:
    tiny_pipeline(prediction_type).save_pretrained(folder)
    return folder


def tiny_sd3(t5: bool = False, shift: float = 3.0) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline of about 35,000 parameters. Its latents have the 16 channels that stock inpainting
    asks for, its second block is of the kind of SD 3.5, its encoders differ in width, and with T5 there is a third."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "shapes-clip")

    def clip(width: int) -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length, projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).eval()

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=24, pos_embed_max_size=8,
        dual_attention_layers=(1,), qk_norm="rms_norm")
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(8, 8), layers_per_block=1, latent_channels=16, norm_num_groups=4,
                        sample_size=16,
                        scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    words = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581red", "\u2581blue", "\u2581ring", "\u2581square"]
    t5_tokenizer = T5TokenizerFast(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0,
                                   model_max_length=16)
    encoder = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1,
                                      num_heads=2)).eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        text_encoder=clip(16), tokenizer=tokenizer, text_encoder_2=clip(8), tokenizer_2=tokenizer,
        text_encoder_3=encoder if t5 else None, tokenizer_3=t5_tokenizer if t5 else None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def qwen_tokenizer(template: str | None = None, words: str = "") -> Qwen2Tokenizer:
    """A Qwen2Tokenizer of bytes, of the marks of a chat, and of these words. template: of chats."""
    found = {word.replace(" ", "\u0120") for word in re.findall(" ?[A-Za-z]+", words)}
    spelled = sorted(found, key=lambda word: (word[0] != "\u0120", word))         # those after a space are merged first
    merges = dict.fromkeys((word[:i], word[i]) for word in spelled for i in range(1, len(word)))
    tokens = [*sorted(ByteLevel.alphabet()), *map("".join, merges)]
    return Qwen2Tokenizer({token: i for i, token in enumerate(tokens)}, list(merges), chat_template=template,
                          additional_special_tokens=["<|im_start|>", "<|im_end|>"])


def save_tiny_sd3(folder: Path, t5: bool = False, call: dict | None = None) -> Path:
    """call: what a stepdistill.json beside it says that every call is given."""
    tiny_sd3(t5).save_pretrained(folder)
    if call is not None:
        (folder / "stepdistill.json").write_text(json.dumps({"call": call}), encoding="utf-8")
    return folder


def reading(needs: dict, *roles: str, numbers: tuple[str, ...] = ("w",)) -> dict:
    """The same needs, where these roles read numbers beside their time."""
    return {name: replace(need, reads=numbers) if name in roles else need for name, need in needs.items()}


def style(pipe: DiffusionPipeline, folder: Path, size: float = 1.0, seed: int = 0) -> FusedLora:
    """A LoRA of rank 2 that changes pictures much."""
    network = pipe.components["unet" if "unet" in pipe.components else "transformer"]
    torch.manual_seed(seed)
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"]))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data = size * torch.randn_like(parameter)
    layers = {"unet_lora_layers" if "unet" in pipe.components
              else "transformer_lora_layers": get_peft_model_state_dict(network)}
    type(pipe).save_lora_weights(folder, **layers)
    network.delete_adapters(["default"])
    return FusedLora(str(folder))
