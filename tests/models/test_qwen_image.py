"""What the matrix of families does not ask of Qwen-Image: its arguments in a stock call, guidance, and refusals."""
from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from families.qwen_image import CALL, tiny

from stepdistill import api
from stepdistill.diffusion.sampler import Sampler
from stepdistill.errors import RequestError
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.families.qwen_image import combine
from stepdistill.models.teacher import load_teacher
from stepdistill.models.tokens import packed, unpacked
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check, check_attention
from stepdistill.run.plan import plan

PROMPTS = ["a ring", "a blue square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("qwen-image")
    tiny().save_pretrained(made)
    (made / "stepdistill.json").write_text(json.dumps({"call": CALL}))
    return made


@pytest.fixture
def teacher(folder):
    return load_teacher(folder)


def asked(network):
    """The keyword arguments of every call of a network from here on."""
    calls = []
    network.register_forward_pre_hook(lambda module, args, given: calls.append(given), with_kwargs=True)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompts", [PROMPTS, ["a ring"]])
def test_the_network_is_asked_what_a_stock_call_asks(folder, dtype, prompts):
    """Its time too, which a stock call rounds twice: in bfloat16 2/3 is told as 0.668."""
    teacher = load_teacher(folder, dtype=dtype)
    stock, x = teacher.pipeline(scheduler=FlowMatchEulerDiscreteScheduler()), torch.randn(len(prompts), 4, 8, 8)
    stock.set_progress_bar_config(disable=True)
    theirs, ours = asked(stock.transformer), asked(teacher.network)
    stock(prompts, num_inference_steps=3, latents=packed(x).to(dtype), output_type="latent", **CALL)
    sampler = Sampler.of(stock.scheduler, 3, teacher.schedule, sigmas=[1.0, 2 / 3, 1 / 3])
    with torch.no_grad():
        sampler(Denoiser(teacher, teacher.network), x, teacher.encode(prompts))
    torch.testing.assert_close(ours[0]["hidden_states"], theirs[0]["hidden_states"])
    for own, other in zip(ours, theirs, strict=True):
        assert own["img_shapes"] == other["img_shapes"]
        torch.testing.assert_close(own["timestep"], other["timestep"])
        torch.testing.assert_close(own["encoder_hidden_states"], other["encoder_hidden_states"])
        mask, expected = own["encoder_hidden_states_mask"], other["encoder_hidden_states_mask"]
        assert (mask is None) == (expected is None) == (len(prompts) == 1)
        assert mask is None or torch.equal(mask, expected)


def test_padding_is_no_part_of_a_condition(teacher):
    cond, x, t = teacher.encode(PROMPTS), torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.7], dtype=torch.float64)
    filled = cond.replace(text=torch.where(cond.mask[..., None] > 0, cond.text, 7.0))
    with torch.no_grad():
        raws = [teacher.predict(teacher.network, x, t, given) for given in (cond, filled)]
    torch.testing.assert_close(*raws)


def test_tokens_are_the_pipelines():
    x = torch.randn(2, 4, 6, 8)
    tokens = packed(x)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpacked(tokens, x.shape), x)


def test_guidance_gives_each_token_the_length_that_it_has_with_the_condition():
    given, without = torch.randn(2, 2, 4, 4, 2, generator=torch.Generator().manual_seed(0)).movedim(-1, 0)
    for w in (1.0, 2.5):
        mixed, linear = combine(given, without, torch.full((2, 1, 1, 1), w)), without + w * (given - without)
        for row in range(0, 4, 2):
            token = (..., slice(row, row + 2), slice(2, 4))
            lengths = [whole[token].flatten(1).norm(dim=1)[:, None, None, None] for whole in (given, linear)]
            torch.testing.assert_close(mixed[token], linear[token] / lengths[1] * lengths[0])


def test_pixels_beyond_the_range_have_gradients(teacher):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config, vae = teacher.codec.network.config, teacher.codec.network
    vae.decoder.conv_out.weight.data *= 10
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        clipped = vae.decode(latents[:, :, None] * std + mean).sample[:, :, 0]
    pixels = teacher.pixels(latents.requires_grad_())
    beyond = pixels.detach().abs() > 1
    assert beyond.any()
    torch.testing.assert_close(pixels.clamp(-1, 1), clipped)
    assert torch.autograd.grad(pixels[beyond].sum(), latents)[0].abs().sum() > 0


def test_its_own_size_is_the_default_of_a_call(folder, teacher):
    (folder / "stepdistill.json").rename(folder / "aside.json")
    own, side = load_teacher(folder, device="meta").latent_shape, 128 * 4
    (folder / "aside.json").rename(folder / "stepdistill.json")
    noise = teacher.pipeline().prepare_latents(1, 4, side, side, torch.float32, "cpu", None)
    assert own == (4, 128, 128) and noise.shape[1:] == (64 * 64, 16) and teacher.latent_shape == (4, 8, 8)


def test_a_fresh_network_knows_positions(teacher):
    cond, x, t = teacher.encode(PROMPTS), torch.randn(2, 4, 8, 12), torch.tensor([0.3, 0.8], dtype=torch.float64)
    fresh = teacher.fresh_network(teacher.network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(*(teacher.predict(network, x, t, cond) for network in (fresh, teacher.network)))


def test_blocks_give_maps(teacher):
    """Row by row, as the network puts tokens back: the last block's map, normed and projected, is the raw output."""
    network, found, x = teacher.network, [], torch.randn(2, 4, 8, 4)
    network.transformer_blocks[-1].register_forward_hook(
        lambda module, args, given, output: found.append((output, given["temb"])), with_kwargs=True)
    with torch.no_grad():
        raw = teacher.predict(network, x, torch.tensor([0.2, 0.9], dtype=torch.float64), teacher.encode(PROMPTS))
        tokens = teacher.feature_map(found[0][0], x).flatten(2).transpose(1, 2)
        patches = network.proj_out(network.norm_out(tokens, found[0][1]))
    corner = patches.unflatten(1, (4, 2)).unflatten(3, (4, 2, 2))[:, :, :, :, 0, 1].permute(0, 3, 1, 2)
    torch.testing.assert_close(raw[:, :, 0::2, 1::2], corner)


def recipe(folder, **settings) -> dict:
    return {"method": "lcm", "teacher": str(folder), "student": {"lora": {"rank": 2}}, "guidance": 2.0, "steps": 2,
            "settings": settings, "data": {"images": "shapes", "count": 4, "batch": 2},
            "train": {"updates": 2, "lr": 1e-2}}


def test_a_plan_needs_no_values_of_masks_and_positions(folder):
    found = plan(Recipe.load(recipe(folder)))["passes"]
    assert (found["forward"], found["backward"]) == (4, 1)


def test_flash_attention_and_compiled_blocks_are_refused_before_anything_is_loaded(folder):
    wanted = Recipe.load(recipe(folder), {"train.attention": "flash"})
    with pytest.raises(RequestError, match="train.attention is flash, which cannot serve: .*takes no mask"):
        check_attention(wanted, "flash", torch.device("cpu"))
    check_attention(wanted, "sdpa", torch.device("cpu"))
    with pytest.raises(RequestError, match="train.compile is on, but texts of each length"):
        check(Recipe.load(recipe(folder), {"train.compile": True}))


@pytest.mark.long
def test_a_student_that_reads_its_guidance_scale_leaves_as_a_stock_lora(folder, tmp_path):
    """The time is told in another way than in SD3, so that what the student reads is folded into the same layer."""
    api.train(recipe(folder, guidance_embedding=True) | {"evaluate": {"prompts": PROMPTS}}, out=tmp_path / "run")
    made = api.export(tmp_path / "run", to="lora", guidance=2.0)
    assert json.loads((made / "stepdistill.json").read_text())["proof"]["difference"] <= 1e-4


def test_a_scheduler_that_shifts_by_the_pipelines_size_serves_any_number_of_steps(folder):
    """Its `mu` is the pipeline's to say, and a teacher can be sampled at a number of steps that is asked for."""
    assert [picture.size for picture in api.sample(folder, PROMPTS, steps=2, guidance=2.0)] == [(32, 32)] * 2


def test_teachers_that_it_does_not_translate(folder, tmp_path):
    pipeline = QwenImagePipeline.from_pretrained(folder)
    network, vae = pipeline.transformer, pipeline.vae
    pipeline.transformer = type(network).from_config(network.config, guidance_embeds=True, zero_cond_t=True)
    pipeline.vae = type(vae).from_config(vae.config, input_channels=4)
    pipeline.scheduler = DDIMScheduler()
    pipeline.save_pretrained(tmp_path)
    said = "guidance_embeds.*edits pictures.*gives 4 channels.*DDIMScheduler is none of flow matching"
    with pytest.raises(RequestError, match=said):
        load_teacher(tmp_path, device="meta")
