"""A stock call of the base before the first update: what it lets through, and what it refuses."""
from __future__ import annotations

import pytest
import torch
from tiny import save_tiny_sd3, tiny_pipeline

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.recipe import Recipe
from stepdistill.run import first_call
from stepdistill.run.first_call import check_first_call
from stepdistill.run.setup import setup

LORA = {"lora": {"rank": 2}}
METHODS = {
    "lcm": {"method": "lcm", "guidance": 3.0, "data": {"images": "shapes", "count": 4, "batch": 2}},
    "lcm, guidance embedding": {"method": "lcm", "guidance": [2.0, 4.0],
                                "data": {"images": "shapes", "count": 4, "batch": 2}},
    "dmd2": {"method": "dmd2", "critic": LORA, "guidance": 2.0, "settings": {"gan_weight": 0.0},
             "data": {"prompts": ["a red ring"], "batch": 2}},
}


def recipe(teacher, name="lcm", **train) -> dict:
    return {"teacher": str(teacher), "student": LORA, "steps": 4, "train": {"updates": 1, **train}, **METHODS[name]}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3"), call={"max_sequence_length": 0})


@pytest.mark.parametrize("name, precision, limit", [*((name, "fp32", 1e-4) for name in METHODS), ("lcm", "bf16", 2**-5),
                                                    ("dmd2", "fp16", 2**-5)])
def test_the_base_is_called_as_the_student_will_be(tiny_teacher, sd3, name, precision, limit):
    for teacher in (tiny_teacher, sd3):
        run = setup(Recipe.load(recipe(teacher, name, precision=precision)), torch.device("cpu"))
        scheduler = run.teacher.loaded.scheduler
        difference = check_first_call(run)
        assert difference <= limit and run.teacher.loaded.scheduler is scheduler


def test_it_counts_with_all_digits_of_float32_on_a_card_too(tiny_teacher, monkeypatch):
    seen = []
    flags = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    before = flags()
    inner = first_call.sampled
    monkeypatch.setattr(first_call, "sampled", lambda *given: seen.append(flags()) or inner(*given))
    check_first_call(setup(Recipe.load(recipe(tiny_teacher)), torch.device("cpu")))
    assert seen == [(False, False)] and flags() == before and before[1]


def test_toy_has_no_pipeline():
    assert check_first_call(setup(Recipe.load("toy/lcm"), torch.device("cpu"))) is None


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_teacher_of_nan_is_refused(tiny_teacher, part):
    run = setup(Recipe.load(recipe(tiny_teacher)), torch.device("cpu"))
    *_, last = run.teacher.parts[part].parameters()              # of an autoencoder the decoder's side
    last.data.fill_(float("nan"))
    with pytest.raises(RequestError, match="draws a picture of NaN or infinities.* Nothing was trained"):
        check_first_call(run)


def test_a_pipeline_that_is_not_called_as_we_think_is_refused(tiny_teacher):
    run = setup(Recipe.load(recipe(tiny_teacher)), torch.device("cpu"))
    run.teacher.codec.scale *= 1.5
    with pytest.raises(RequestError, match=r"teacher is .*, whose stock StableDiffusionPipeline, called with .* "
                       r"differs from our sampler by"):
        check_first_call(run)


def test_a_size_that_the_pipeline_cannot_draw_is_refused_before_training(tmp_path):
    tiny_pipeline(sample_size=9).save_pretrained(tmp_path / "odd")
    with pytest.raises(RequestError, match="have sides of a multiple of 8 pixels; found 18 of 18 x 18"):
        api.train(recipe(tmp_path / "odd"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
