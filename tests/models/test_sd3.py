"""The family of flow transformers on tiny random Stable Diffusion 3 pipelines: with T5, without it, and with nothing in
its place."""
from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchLCMScheduler, StableDiffusion3Pipeline
from safetensors.torch import save_file
from tiny import save_tiny_sd3, tiny_sd3

from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import Sampler
from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Trained
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.sources import call_of
from stepdistill.models.teacher import load_teacher

PROMPTS = ["a red ring", "a blue square"]
KINDS = {"t5": (True, {"max_sequence_length": 6}), "zeros": (False, None),
         "clip alone": (False, {"max_sequence_length": 0})}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_tiny_sd3(tmp_path_factory.mktemp("sd3"), t5, call) for name, (t5, call) in KINDS.items()}


@pytest.fixture(params=KINDS)
def any_family(request, folders):
    return load_teacher(folders[request.param])


@pytest.fixture
def family(folders):
    return load_teacher(folders["clip alone"])


def latents(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def test_conditions_are_the_pipelines_own(any_family):
    text, null, pooled, null_pooled = any_family.pipeline().encode_prompt(PROMPTS, None, None, **any_family.call)
    cond = any_family.encode(PROMPTS)
    assert cond.text.shape[1] == 20 + any_family.call.get("max_sequence_length", 256)
    torch.testing.assert_close((cond.text, cond.pooled), (text, pooled))
    torch.testing.assert_close((cond.null.text, cond.null.pooled), (null, null_pooled))
    # a wrong eos_token_id would make them equal
    first, second = (cond.pooled[0] - cond.pooled[1]).abs().split([16, 8])
    assert min(first.max(), second.max()) > 1e-2


@pytest.mark.parametrize("kind, t5", [("t5", True), ("zeros", False)])
def test_t5_is_kept_where_the_teacher_has_it(folders, kind, t5):
    family = load_teacher(folders[kind])
    stock = family.pipeline()
    assert type(stock) is StableDiffusion3Pipeline and stock.transformer is not family.network
    assert (stock.text_encoder_3 is not None) == t5 == (not family.without)
    assert stock.vae is family.codec.network


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_sampler_gives_the_latents_of_the_pipeline(any_family, scale):
    """Guidance, the condition, the shifted grid of the teacher's own scheduler and its clock."""
    stock, x = any_family.pipeline(), latents()
    stock.set_progress_bar_config(disable=True)
    theirs = stock(PROMPTS, num_inference_steps=3, guidance_scale=scale, latents=x, output_type="latent",
                   **any_family.call).images
    sampler = Sampler.of(stock.scheduler, 3, any_family.schedule)
    ours = sampler(guided(Denoiser(any_family, any_family.network), scale), x, any_family.encode(PROMPTS))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_stochastic_sampler_draws_as_the_pipeline_from_the_global_generator(family):
    stock, sigmas = family.pipeline(scheduler=FlowMatchLCMScheduler(shift=2.0)), [1.0, 0.6, 0.3]
    stock.set_progress_bar_config(disable=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = stock(PROMPTS, guidance_scale=1.0, sigmas=sigmas, latents=latents(), output_type="latent",
                       **family.call).images
    stream = torch.Generator().manual_seed(3)
    sampler = Sampler.of(stock.scheduler, 3, family.schedule, sigmas=sigmas)
    ours = sampler(Denoiser(family, family.network), latents(), family.encode(PROMPTS),
                   lambda i: torch.randn(2, 16, 8, 8, generator=stream))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_codec_shifts_and_scales_as_the_pipeline(family):
    stock, x = family.pipeline(), latents()
    config = stock.vae.config
    pixels = stock.vae.decode(x / config.scaling_factor + config.shift_factor).sample.detach()
    torch.testing.assert_close(family.decode(x), pixels.clamp(-1, 1))
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = family.codec.network.encode(pictures).latent_dist.mean.detach()
    torch.testing.assert_close(family.encode_images(pictures), (mean - 0.06) * 1.5)
    draws = [family.encode_images(pictures, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_told_times_are_noise_levels(family):
    t = torch.tensor([0.0, 0.1234567, 1.0], dtype=torch.float64)
    assert family.timestep(t).tolist() == [0.0, 123.4567, 1000.0] and torch.equal(family.schedule.sigma(t), t)
    raw = Denoiser(family, family.network)(latents(3), t, family.encode(["a"] * 3))
    assert raw.kind == family.kind == "velocity" and torch.equal(raw.velocity, raw.raw)


def test_an_adapter_on_it(any_family, perturb):
    cond, x, t = any_family.encode(PROMPTS), latents(), torch.tensor([0.5, 1.0], dtype=torch.float64)
    roles = build_roles(any_family, {"teacher": Frozen(), "student": Trained()}, {"student": Lora(4)},
                        gradient_checkpointing=True)
    before = roles["teacher"](x, t, cond).raw
    assert torch.equal(roles["student"](x, t, cond).raw, before)
    perturb(roles.parameters("student"))
    roles["student"](x, t, cond).raw.square().mean().backward()
    still = [name for name, parameter in zip(roles.state_dict("student"), roles.parameters("student"), strict=True)
             if not parameter.grad.any()]
    assert still == [f"transformer_blocks.2.attn.add_q_proj.lora_{part}.weight" for part in "AB"]
    assert torch.equal(roles["teacher"](x, t, cond).raw, before)
    torch.testing.assert_close(any_family.predict(roles.network("student"), x, t, cond),
                               roles["student"](x, t, cond).raw,
                               rtol=1e-4, atol=1e-5)


def test_every_linear_layer_of_the_blocks_is_adapted(family):
    roles = build_roles(family, {"teacher": Frozen(), "student": Trained()}, {"student": Lora(1)})
    adapted = {name.rsplit(".lora_", 1)[0] for name in roles.state_dict("student")}
    blocks = {name for name, module in tiny_sd3().transformer.named_modules()
              if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks.")}
    assert adapted == blocks | {"norm_out.linear"}


def test_a_fresh_network_is_stock_and_computes_the_same(family):
    cond, t = family.encode(PROMPTS), torch.tensor([0.3, 0.8], dtype=torch.float64)
    fresh = family.fresh_network(family.network.state_dict())
    torch.testing.assert_close(family.predict(fresh, latents(), t, cond),
                               family.predict(family.network, latents(), t, cond))
    assert fresh.config == family.network.config and not any(p.requires_grad for p in fresh.parameters())


def test_blocks_give_maps(family):
    """Row by row, as the network itself puts tokens back: the last block's map, normed and projected, is the raw
    output."""
    network, found, x = family.network, {}, latents()[:, :, :, :4]
    for name in family.feature_shapes:
        network.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: found.update(
            {name: output}))
    cond, t = family.encode(PROMPTS), torch.tensor([0.2, 0.9], dtype=torch.float64)
    raw = family.predict(network, x, t, cond)
    maps = {name: family.feature_map(output, x) for name, output in found.items()}
    assert list(maps) == list(family.feature_shapes) and set(family.default_features) <= set(maps)
    assert all(m.shape == (2, 16, 4, 2) for m in maps.values()) and set(family.feature_shapes.values()) == {(16, 4, 4)}
    embedded = network.time_text_embed(family.timestep(t).float(), cond.pooled)
    patches = network.proj_out(network.norm_out(maps["transformer_blocks.2"].flatten(2).transpose(1, 2), embedded))
    corner = patches.unflatten(1, (4, 2)).unflatten(3, (2, 2, 16))[:, :, :, 0, 1].permute(0, 3, 1, 2)
    torch.testing.assert_close(raw[:, :, 0::2, 1::2], corner)


def test_in_bfloat16(folders):
    family = load_teacher(folders["clip alone"], dtype=torch.bfloat16)
    x, t = latents(), torch.tensor([0.999, 1.0], dtype=torch.float64)
    seen = []
    family.network.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    raw = family.predict(family.network, x, t, family.encode(PROMPTS))
    assert raw.dtype == torch.float32 and torch.isfinite(raw).all() and seen[0].tolist() == [999.0, 1000.0]


def test_teachers_that_it_does_not_translate(folders, tmp_path):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folders["zeros"], text_encoder_3=None, tokenizer_3=None)
    pipeline.vae.register_to_config(shift_factor=None)
    pipeline.scheduler = DDIMScheduler()
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="shift_factor.*DDIMScheduler is none of flow matching"):
        load_teacher(tmp_path)
    save_file({"model.diffusion_model.joint_blocks.0.x": torch.zeros(2)}, tmp_path / "sd3.safetensors")
    with pytest.raises(RequestError, match="Stable Diffusion 3 in one file"):
        load_teacher(tmp_path / "sd3.safetensors")


def test_what_every_call_is_given(folders, tmp_path):
    assert call_of(str(folders["clip alone"])) == {"max_sequence_length": 0} and call_of(str(folders["zeros"])) == {}
    settings = {"call": {"num_inference_steps": 4}, "method": "lcm", "teacher_call": {"max_sequence_length": 3}}
    (tmp_path / "stepdistill.json").write_text(json.dumps(settings))
    assert call_of(str(tmp_path)) == {"max_sequence_length": 3}
    (tmp_path / "stepdistill.json").write_text('{"calls": {}}')
    with pytest.raises(RequestError, match='stepdistill.json is damaged.*"call"'):
        call_of(str(tmp_path))
