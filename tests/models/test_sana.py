"""Sana: the instruction before its prompts, its time, and schedulers of a flow."""
from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from families.sana import tiny_sana

from stepdistill.errors import RequestError
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.teacher import load_teacher

PROMPTS = ["a red ring", "a blue square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sana")
    tiny_sana(solver=True, scale=0.5).save_pretrained(folder)
    return folder


def test_prompts_follow_the_instruction_of_a_stock_call_and_the_null_does_not(folder):
    teacher = load_teacher(folder)
    stock, cond = teacher.pipeline(), teacher.encode(PROMPTS)
    bare, mask, null, null_mask = stock.encode_prompt(PROMPTS)
    assert torch.equal(cond.null.text, null) and torch.equal(cond.null.mask, null_mask)
    assert cond.text.shape == bare.shape == (2, 300, 16) and not torch.equal(cond.mask, mask)
    told = stock.encode_prompt(PROMPTS, complex_human_instruction=teacher.asked["complex_human_instruction"])
    assert torch.equal(cond.text, told[0]) and torch.equal(cond.mask, told[1])
    assert teacher.asked["complex_human_instruction"][-1] == "User Prompt: "


def test_calls_say_its_own_size_and_pick_none_from_a_table(folder):
    assert load_teacher(folder).call == {"height": 32, "width": 32, "use_resolution_binning": False}
    wide = load_teacher(folder, resolution=(32, 64))
    assert (wide.call == {"height": 32, "width": 64, "use_resolution_binning": False}
            and wide.latent_shape == (4, 16, 32))


def test_its_sinusoids_are_of_the_time_that_gets_there(folder):
    """It is multiplied by the network's timestep_scale."""
    teacher, seen = load_teacher(folder), []
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    place = teacher.network.time_embed.emb.time_proj
    place.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    Denoiser(teacher, teacher.network)(torch.randn(2, *teacher.latent_shape), t, teacher.encode(PROMPTS))
    assert seen[0][0].tolist() == [125.0, 500.0]
    torch.testing.assert_close(teacher.sinusoids(teacher.timestep(t)), seen[0][1].double())


def test_teachers_that_it_does_not_translate(tmp_path):
    pipeline = tiny_sana()
    pipeline.scheduler = DDIMScheduler()
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, guidance_embeds=True)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="reads a guidance scale, which its pipeline does not say; .*DDIMScheduler "
                       "is none of flow"):
        load_teacher(tmp_path)
