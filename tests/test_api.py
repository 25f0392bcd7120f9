"""From a recipe to an export and back for a flow-matching teacher, in one process: the commands' tests do the same for
a UNet."""
from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from tiny import save_tiny_sd3

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.export import read_settings

PROMPTS = ["a red ring", "a blue square"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny_sd3(tmp_path_factory.mktemp("teacher"), call={"max_sequence_length": 0})


@pytest.fixture(scope="module")
def recipe(teacher):
    return {"method": "lcm", "teacher": str(teacher), "student": {"lora": {"rank": 2}}, "guidance": 2.0, "steps": 3,
            "settings": {"nodes": 7, "shift": 3.0}, "data": {"images": "shapes", "count": 16, "cache": True,
                                                             "batch": 4},
            "train": {"updates": 2, "lr": 1e-2, "ema": 0.5}, "evaluate": {"prompts": PROMPTS}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def pixels(pictures) -> torch.Tensor:
    return torch.stack([torch.tensor(list(picture.getdata()), dtype=torch.float32) for picture in pictures])


def test_train_export_load(recipe, teacher, tmp_path):
    run = api.train(recipe, out=tmp_path / "run")
    folder = api.export(run)
    settings = read_settings(folder)
    assert settings["call"] == {"num_inference_steps": 3, "guidance_scale": 1.0, "sigmas": [1.0, 5 / 7, 3 / 7],
                                "max_sequence_length": 0}
    weights = load_file(folder / settings["weights"])
    moved = [name for name, value in weights.items() if ".lora_B." in name and value.any()]
    assert len(moved) == len(weights) // 2 - 1                # all but the last block's add_q_proj
    pipe = StableDiffusion3Pipeline.from_pretrained(teacher, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    settings = api.load(pipe, folder)
    pictures = pipe(PROMPTS, generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images
    assert pictures.shape == (2, 3, 16, 16) and torch.isfinite(pictures).all()
    of_run, of_export = (pixels(api.sample(target, PROMPTS)) for target in (run, folder))
    assert (of_run - of_export).abs().max() <= 1              # a merged adapter rounds differently
    assert (of_run[0] - of_run[1]).abs().max() > 1
    again = api.sample(folder, PROMPTS)
    assert torch.equal(pixels(again), of_export)              # though the scheduler draws from the global generator


def test_a_teacher_with_a_call_of_its_own_is_sampled_with_it(teacher):
    assert len(api.sample(teacher, PROMPTS, steps=2)) == 2
    opened = api.open_target(teacher, "teacher")
    assert opened.target.call is None and opened.target.given == {"max_sequence_length": 0}


def test_a_student_of_a_flow_reads_its_scale_and_leaves_at_one(recipe, tmp_path):
    """Its class has no input for a guidance scale: training gives it one, and an export folds what it adds at a
    scale."""
    run = api.train(recipe | {"guidance": [1.0, 4.0]}, out=tmp_path / "run", **{"settings.guidance_embedding": True})
    with pytest.raises(RequestError, match="has a guidance embedding, and its weights can hold one scale: add "
                       "--guidance W"):
        api.export(run)
    assert not (run / "export").exists()
    settings = read_settings(api.export(run, guidance=3.0))
    assert (settings["guidance"] == 3.0 and settings["call"]["guidance_scale"] == 1.0
            and settings["proof"]["difference"] <= 1e-4)
