"""The same family on a tiny random SDXL pipeline: two text encoders, a pooled embedding and size conditions."""
from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tiny import ASSETS
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stepdistill.methods.base import Frozen, Trained
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.teacher import load_teacher

PROMPTS = ["a red circle", "a blue square"]


def save_tiny_xl(folder, zeros):
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "shapes-clip")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id, projection_dim=16,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), cross_attention_dim=32, attention_head_dim=(2, 4), norm_num_groups=8,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8)
    codec = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                          block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                          sample_size=16)
    StableDiffusionXLPipeline(
        vae=codec.eval(), text_encoder=CLIPTextModel(text).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text).eval(),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet.eval(), force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                         timestep_spacing="leading", steps_offset=1)).save_pretrained(folder)
    return folder


@pytest.fixture(params=[True, False], ids=["zeros", "empty"])
def family(request, tmp_path):
    return load_teacher(save_tiny_xl(tmp_path, request.param))


def test_conditions_are_the_pipelines_own(family):
    stock = family.pipeline()
    assert type(stock) is StableDiffusionXLPipeline
    text, null, pooled, null_pooled = stock.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    cond = family.encode(PROMPTS)
    assert torch.equal(cond.text, text) and torch.equal(cond.pooled, pooled)
    torch.testing.assert_close((cond.null.text, cond.null.pooled), (null, null_pooled))
    assert cond.null.text.any() != stock.config.force_zeros_for_empty_prompt
    assert cond.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2 == cond.null.time_ids.tolist()
    assert (cond.pooled[0] - cond.pooled[1]).abs().max() > 1e-2


def test_one_guided_step_is_the_pipelines(family):
    """The pipeline's clean sample after one step at 5 times guidance, from raw outputs under cond and cond.null."""
    stock, x, scale = family.pipeline(), torch.randn(2, *family.latent_shape), 5.0
    theirs = stock(PROMPTS, num_inference_steps=1, guidance_scale=scale, latents=x, height=16, width=16,
                   output_type="latent").images
    timestep = stock.scheduler.timesteps[:1].double()
    t = ((timestep + 1) / 1000).expand(2)
    sigma = stock.scheduler.sigmas[0].item()
    noisy = x * (stock.scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5)
    cond = family.encode(PROMPTS)
    teacher = build_roles(family, {"teacher": Frozen()}, {})["teacher"]
    with_text, without = teacher(noisy, t, cond), teacher(noisy, t, cond.null)
    ours = without.x0 + scale * (with_text.x0 - without.x0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_an_adapter_on_it(family, perturb):
    cond, x, t = (family.encode(PROMPTS), torch.randn(2, *family.latent_shape),
                  torch.tensor([0.5, 1.0], dtype=torch.float64))
    roles = build_roles(family, {"teacher": Frozen(), "student": Trained(reads=("w",))}, {"student": Lora(4)},
                        gradient_checkpointing=True)
    scaled = cond.replace(w=torch.tensor([2.0, 8.0]))
    before = roles["teacher"](x, t, cond).raw
    torch.testing.assert_close(roles["student"](x, t, scaled).raw, before, rtol=1e-5, atol=1e-6)
    perturb(roles.parameters("student"))
    roles["student"](x, t, scaled).raw.square().mean().backward()
    assert all(parameter.grad is not None for parameter in roles.parameters("student"))
    assert torch.equal(roles["teacher"](x, t, cond).raw, before)
    torch.testing.assert_close(family.predict(roles.network("student"), x, t, scaled),
                               roles["student"](x, t, scaled).raw,
                               rtol=1e-4, atol=1e-5)
