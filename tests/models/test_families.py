from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from tiny import save_tiny

from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.schedule import VariancePreserving
from stepdistill.errors import RequestError
from stepdistill.models import sources
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.extra_embedding import embedding
from stepdistill.models.families import FAMILIES
from stepdistill.models.sources import Source
from stepdistill.models.teacher import load_teacher


@pytest.mark.parametrize(("prediction_type", "kind"), [("epsilon", "eps"), ("v_prediction", "v")])
def test_a_role_predicts_what_the_unet_does_at_the_same_timestep(folders, prediction_type, kind):
    family = load_teacher(folders[prediction_type])
    stock = family.pipeline()
    x, timesteps = torch.randn(4, *family.latent_shape), torch.tensor([0, 19, 499, 999])
    cond = family.encode(["a red circle"] * 4)
    prediction = Denoiser(family, family.network)(x, (timesteps.double() + 1) / 1000, cond)
    assert torch.equal(prediction.raw, family.network(x, timesteps, cond.text).sample)
    assert prediction.kind == family.kind == kind and isinstance(family.schedule, VariancePreserving)
    for i, node in enumerate(timesteps.tolist()):
        _, x0 = ddim_views(stock.scheduler, prediction.raw[i], node, x[i])
        torch.testing.assert_close(prediction.x0[i], x0, rtol=1e-4, atol=1e-4)


def ddim_views(scheduler, raw, node, x):
    """DDIM's next state and its clean sample, unclipped."""
    scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    return scheduler.step(raw, node, x, return_dict=False)


def test_told_times_are_whole_at_every_node_and_exact_between(family):
    nodes = torch.arange(1000)
    assert torch.equal(family.timestep((nodes.double() + 1) / 1000), nodes.double())
    assert family.timestep(torch.tensor([0.12345678])).dtype == torch.float64
    torch.testing.assert_close(family.timestep(torch.tensor([0.5005], dtype=torch.float64)),
                               torch.tensor([499.5], dtype=torch.float64))


def test_autocast_leaves_the_told_time_alone(family):
    """999 and 998 are one number in bfloat16."""
    seen = []
    family.network.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, t = torch.randn(2, *family.latent_shape), torch.tensor([0.999, 1.0], dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        raw = family.predict(family.network, x, t, family.encode(["a", "b"]))
    assert seen[0].tolist() == [998.0, 999.0] and raw.dtype == torch.float32


def test_encodings_are_the_pipelines_own_and_differ_between_prompts(family):
    cond = family.encode(["a red circle", "a blue square"])
    text, null = family.pipeline().encode_prompt(["a red circle", "a blue square"], "cpu", 1, True)
    assert torch.equal(cond.text, text)
    torch.testing.assert_close(cond.null.text, null)
    assert (cond.text[0] - cond.text[1]).abs().max() > 1e-2
    assert len(cond) == len(cond.null) == 2 and cond.null.null is None
    assert torch.equal(cond[:1].null.text, cond.null.text[:1])


def test_the_codec_is_the_pipelines(family):
    stock = family.pipeline()
    latents = torch.randn(2, *family.latent_shape)
    images = stock(prompt_embeds=torch.zeros(2, 4, 16), num_inference_steps=1, guidance_scale=1.0, latents=latents,
                   output_type="latent").images
    pixels = stock.image_processor.postprocess(
        stock.vae.decode(images / stock.vae.config.scaling_factor).sample.detach(), output_type="np")
    ours = family.decode(images).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert np.abs(ours - pixels).max() < 1e-6
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = family.codec.network.encode(pictures).latent_dist.mean
    torch.testing.assert_close(family.encode_images(pictures), mean * family.codec.network.config.scaling_factor)
    draws = [family.encode_images(pictures, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_w_is_embedded_as_stock_pipelines_embed_guidance_scale(family):
    stock = family.pipeline()
    scales = [1.0, 1.5, 3.0, 7.3, 8.123456789, 15.0]
    theirs = torch.cat([stock.get_guidance_scale_embedding(torch.tensor(scale - 1).repeat(1), embedding_dim=256)
                        for scale in scales])
    assert torch.equal(embedding("w", torch.tensor(scales, dtype=torch.float64)), theirs)
    torch.testing.assert_close(embedding("w", torch.tensor(scales)), theirs, rtol=0, atol=3e-3)


def test_a_fresh_network_is_stock_and_computes_the_same(family, inputs):
    fresh = family.fresh_network(family.network.state_dict())
    torch.testing.assert_close(family.predict(fresh, *inputs), family.predict(family.network, *inputs))
    assert fresh.config == family.network.config
    assert not {p.data_ptr() for p in fresh.parameters()} & {p.data_ptr() for p in family.network.parameters()}


def test_pipeline_is_new_and_takes_a_network_and_a_scheduler(family):
    stock = family.pipeline()
    assert (type(stock) is StableDiffusionPipeline and stock.unet is not family.network
            and stock.scheduler is not family.scheduler)
    scheduler = DDIMScheduler.from_config(family.scheduler.config)
    mine = family.pipeline(family.network, scheduler)
    assert mine.unet is family.network and mine.scheduler is scheduler


def test_bfloat16_teachers_run(folders):
    family = load_teacher(folders["epsilon"], dtype=torch.bfloat16)
    cond = family.encode(["a red circle"])
    raw = family.predict(family.network, torch.randn(1, *family.latent_shape), torch.ones(1, dtype=torch.float64), cond)
    assert raw.dtype == torch.float32 and family.network.dtype == torch.bfloat16
    assert family.decode(raw).dtype == torch.float32


def test_a_text_is_required(family):
    x, t = torch.zeros(1, *family.latent_shape), torch.ones(1, dtype=torch.float64)
    for cond in (None, Condition(label=torch.zeros(1, dtype=torch.long))):
        with pytest.raises(ValueError, match="reads text: pass a condition"):
            Denoiser(family, family.network)(x, t, cond)


# ---- what cannot be loaded

@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders["epsilon"], tmp_path / "teacher")


def refused(source, *words, **options):
    with pytest.raises(RequestError) as error:
        load_teacher(source, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_folders(tmp_path, monkeypatch):
    refused(tmp_path / "nowhere", "there is no folder", "nowhere")
    (tmp_path / "assets").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("assets/shapes-sd", "there is no folder", "assets/shapes-sd", str(tmp_path))
    refused("./one/two", "there is no folder")


def test_folders_that_are_no_pipeline(tmp_path, copy):
    refused(tmp_path, "no model_index.json", "it holds teacher")
    (copy / "model_index.json").write_text("{", encoding="utf-8")
    refused(copy, "model_index.json is damaged")
    (copy / "model_index.json").write_text("[]", encoding="utf-8")
    refused(copy, "model_index.json is damaged")


def test_unsupported_pipelines_are_named_with_the_supported_ones(copy):
    index = json.loads((copy / "model_index.json").read_text(encoding="utf-8"))
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}), encoding="utf-8")
    refused(copy, "KandinskyPipeline", *FAMILIES)


@pytest.mark.parametrize("damage", ["truncated", "scrambled", "empty"])
@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_damaged_weights_are_named_before_anything_is_loaded(copy, monkeypatch, damage, part):
    file = copy / f"{part}.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:-100], "scrambled": b"\xff" * 64 + whole[64:], "empty": b""}[damage])
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    refused(copy, str(file), "damaged or cut short")


def test_a_missing_part_is_reported(copy):
    shutil.rmtree(copy / "vae")
    refused(copy, "not complete", "lists vae")


def test_missing_weights_are_reported(copy):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(copy, "cannot be loaded", "unet")


def test_teachers_that_this_family_does_not_translate(copy):
    config = json.loads((copy / "unet" / "config.json").read_text(encoding="utf-8"))
    pipeline = StableDiffusionPipeline.from_pretrained(copy, safety_checker=None)
    embedding = type(pipeline.unet).from_config(config | {"time_cond_proj_dim": 256})
    StableDiffusionPipeline(**pipeline.components | {"unet": embedding},
                            requires_safety_checker=False).save_pretrained(copy)
    refused(copy, "student already")


def test_unsupported_dtypes(copy):
    refused(copy, "bfloat16", dtype=torch.float16)


@pytest.mark.long
def test_a_hub_id_goes_through_from_pretrained_with_its_revision(monkeypatch, copy):
    asked = []
    real_config = StableDiffusionPipeline.load_config

    def load_config(source, revision=None, **options):
        if source == "owner/name":
            asked.append((source, revision))
        return real_config(copy)

    def download(source, revision, **options):
        asked.append((source, revision))
        assert options["use_safetensors"]
        return str(copy)

    monkeypatch.setattr(sources, "unreachable", lambda: None)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(StableDiffusionPipeline, "load_config", real_config)
    monkeypatch.setattr(StableDiffusionPipeline, "download", download)
    family = load_teacher(Source("owner/name", "v1"))
    assert asked == [("owner/name", "v1")] * 2 and family.source == Source("owner/name", "v1")
    family.pipeline()
    assert asked == [("owner/name", "v1")] * 3


def test_what_the_hub_does_not_supply_is_a_bad_request(monkeypatch):
    def load_config(source, **options):
        raise OSError("owner/name is not a local folder and is not a valid model identifier\nmore")

    monkeypatch.setattr(sources, "unreachable", lambda: None)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load_config)
    refused("owner/name", "owner/name", "not a valid model identifier")


def test_single_files(tmp_path, monkeypatch, folders):
    file = tmp_path / "model.safetensors"
    save_file({"lora.weight": torch.zeros(2)}, file)
    refused(file, "model.diffusion_model.", "lora.weight")
    save_file({"model.diffusion_model.out.weight": torch.zeros(2)}, file)
    asked = []

    def from_single_file(source, **parts):
        asked.append(source)
        return StableDiffusionPipeline.from_pretrained(folders["epsilon"], **parts)

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", from_single_file)
    assert load_teacher(file).source == Source(str(file)) and asked == [str(file)]
    file.write_bytes(file.read_bytes()[:-1])
    refused(file, "model.safetensors", "cut short")
    (tmp_path / "model.ckpt").write_bytes(b"")
    refused(tmp_path / "model.ckpt", "no .safetensors file")


def test_saving_again_keeps_the_teacher(tmp_path):
    """Two loads of one folder are one teacher."""
    folder = save_tiny(tmp_path / "teacher")
    one, two = load_teacher(folder), load_teacher(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True))
    assert not one.network.training and not any(p.requires_grad for p in one.network.parameters())
