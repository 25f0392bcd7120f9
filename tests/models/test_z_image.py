"""What the matrix of families does not ask of Z-Image: padding, 16 bits, plans, and what is refused."""
from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler, ZImagePipeline
from families.z_image import CALL, tiny

from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import Sampler
from stepdistill.errors import RequestError
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check
from stepdistill.run.plan import plan

PROMPTS = ["a ring", "a blue square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("z-image")
    tiny().save_pretrained(made)
    (made / "stepdistill.json").write_text(json.dumps({"call": CALL}))
    return made


@pytest.fixture
def teacher(folder):
    return load_teacher(folder)


def test_captions_are_those_of_the_pipeline_and_padding_is_no_part_of_them(teacher):
    asked = list(PROMPTS)
    cond = teacher.encode(asked)
    own, nulls = teacher.pipeline().encode_prompt(list(PROMPTS), max_sequence_length=40)
    for found, captions in ((cond, own), (cond.null, nulls)):
        assert found.mask.sum(1).tolist() == [len(caption) for caption in captions]
        for row, caption in zip(found.text, captions, strict=True):
            torch.testing.assert_close(row[:len(caption)], caption)
            assert not row[len(caption):].any()
    assert asked == PROMPTS, "the stock pipeline writes its template over a list that it is given"
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.5, 0.7], dtype=torch.float64)
    filled = cond.replace(text=torch.where(cond.mask[..., None] > 0, cond.text, 7.0))
    with torch.no_grad():
        raws = [teacher.predict(teacher.network, x, t, given) for given in (cond, filled)]
    assert torch.equal(*raws)


def test_it_is_told_the_share_of_data_and_its_velocity_leads_to_noise(teacher):
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert teacher.timestep(t).tolist() == [1.0, 0.75, 0.0] and teacher.kind == "velocity"


def test_its_own_size_is_the_default_of_a_call(folder, teacher):
    (folder / "stepdistill.json").rename(folder / "aside.json")
    own = load_teacher(folder, device="meta").latent_shape
    (folder / "aside.json").rename(folder / "stepdistill.json")
    noise = teacher.pipeline().prepare_latents(1, 4, 1024, 1024, torch.float32, "cpu", None)
    assert own == tuple(noise.shape[1:]) and teacher.latent_shape == (4, 8, 8)


def test_blocks_give_maps(teacher):
    """Row by row, as the network puts tokens back: the last block's map, normed and projected, is the raw output."""
    network, found, x = teacher.network, [], torch.randn(2, 4, 8, 4)
    network.layers[-1].register_forward_hook(lambda module, args, output: found.append((output, args[3])))
    with torch.no_grad():
        raw = teacher.predict(network, x, torch.tensor([0.2, 0.9], dtype=torch.float64), teacher.encode(PROMPTS))
        tokens = teacher.feature_map(found[0][0], x).flatten(2).transpose(1, 2)
        patches = network.all_final_layer["2-1"](tokens, c=found[0][1])
    corner = patches.unflatten(1, (4, 2)).unflatten(3, (2, 2, 4))[:, :, :, 0, 1].permute(0, 3, 1, 2)
    torch.testing.assert_close(raw[:, :, 0::2, 1::2], -corner)


def test_in_bfloat16_it_is_told_times_in_float32_and_guided_in_float32(folder):
    teacher = load_teacher(folder, dtype=torch.bfloat16)
    stock, x = teacher.pipeline(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stock.set_progress_bar_config(disable=True)
    theirs = stock(list(PROMPTS), num_inference_steps=3, guidance_scale=2.0, latents=x, output_type="latent", **CALL)
    sampler = Sampler.of(stock.scheduler, 3, teacher.schedule, sigmas=[1.0, 2 / 3, 1 / 3])
    with torch.no_grad():
        ours = sampler(guided(Denoiser(teacher, teacher.network), 3.0), x, teacher.encode(PROMPTS))
    torch.testing.assert_close(ours, theirs.images, rtol=1e-4, atol=1e-4)


def recipe(folder, method: str, **settings) -> Recipe:
    return Recipe.load({
        "method": method, "teacher": str(folder), "student": {"lora": {"rank": 2}}, "guidance": 2.0,
        "settings": settings, "data": {"images": "shapes", "count": 4, "batch": 2}, "train": {"updates": 2}})


def test_a_plan_counts_samples_in_lists(folder):
    """An update of lcm asks the teacher with a condition and without, and the student twice, once with gradients."""
    found = plan(recipe(folder, "lcm"))["passes"]
    assert (found["forward"], found["backward"]) == (4, 1)


def test_a_student_that_reads_another_number_is_refused_before_anything_is_loaded(folder):
    said = "method is lcm, whose student reads w beside its time, but this teacher's network has no one place"
    with pytest.raises(RequestError, match=said):
        check(recipe(folder, "lcm", guidance_embedding=True))
    check(recipe(folder, "lcm"))


def test_teachers_that_it_does_not_translate(folder, tmp_path):
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.vae.register_to_config(shift_factor=None)
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, siglip_feat_dim=8)
    pipeline.scheduler = DDIMScheduler()
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="siglip_feat_dim.*shift_factor.*DDIMScheduler is none of flow matching"):
        load_teacher(tmp_path, device="meta")
