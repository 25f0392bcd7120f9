"""What a teacher's own stepdistill.json may give every call of its pipeline."""
from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from test_sdxl import save_tiny_xl
from tiny import save_tiny, save_tiny_sd3, tiny_pipeline

from stepdistill.errors import RequestError
from stepdistill.methods.base import Inference
from stepdistill.models.sources import SHAPING, Source, call_of
from stepdistill.models.teacher import load_teacher


@pytest.mark.parametrize(("name", "value", "where"), [
    ("guidance_scale", 9.0, "the recipe's guidance says it"), ("num_inference_steps", 3, "the recipe's steps say it"),
    ("negative_prompt", "ugly", "the recipe's negative_prompt says it"), ("eta", 0.5, "the method says it"),
    ("tiling", True, "no call of a teacher is given it")])
@pytest.mark.parametrize("device", [None, "meta"])
def test_what_does_not_shape_a_condition_is_refused_by_name(tmp_path, device, name, value, where):
    folder = save_tiny_sd3(tmp_path, call={"max_sequence_length": 0, name: value})
    with pytest.raises(RequestError, match=f"gives every call of this pipeline {name}: {value!r}, .*{where}"):
        load_teacher(folder, device=device)


def test_what_shapes_conditions_and_sizes_stays(tmp_path):
    call = {"max_sequence_length": 8, "height": 16, "width": 16, "num_frames": 5, "clip_skip": 1,
            "complex_human_instruction": ["a"], "use_resolution_binning": False, "text_encoder_out_layers": [1, 2],
            "clean_caption": True, "system_prompt": "b", "frame_rate": 16.0}
    assert call.keys() == {*SHAPING}
    (tmp_path / "stepdistill.json").write_text(json.dumps({"call": call}))
    assert call_of(str(tmp_path)) == call


def test_a_call_that_the_pipeline_cannot_take_is_refused(tmp_path):
    folder = save_tiny(tmp_path)
    for call, said in (
        ({"height": 16}, "height alone: a size is a height and a width"),
        ({"height": 0, "width": 16}, "height: 0, which should be 1 or more"),
        ({"height": 16, "width": -16}, "width: -16, which should be 1 or more"),
        ({"height": "16", "width": 16}, "call.height is '16', and should be a whole number"),
        ({"height": 20, "width": 16}, "sides of a multiple of 8 pixels; found 20"),
        ({"clip_skip": 0}, "clip_skip: 0, which should be 1 or more"),
        ({"max_sequence_length": 8}, "every call of it is given max_sequence_length, which a call of "
         "StableDiffusionPipeline does not take: leave it out"),
        ({"num_frames": 5}, "num_frames, which a call of StableDiffusionPipeline does not take: leave it out")):
        (folder / "stepdistill.json").write_text(json.dumps({"call": call}))
        with pytest.raises(RequestError, match=said):
            load_teacher(folder, device="meta")


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_a_skipped_layer_of_clip_is_skipped_in_training_too(tmp_path, kind):
    folder = save_tiny_sd3(tmp_path) if kind == "sd3" else save_tiny_xl(tmp_path, True)
    pipe = load_teacher(folder).pipeline()
    others = {"prompt_2": None, "prompt_3": None} if kind == "sd3" else {}
    plain, known = (pipe.encode_prompt(["a red ring"], **others, do_classifier_free_guidance=False, clip_skip=skip)[0]
                    for skip in (None, 1))
    (tmp_path / "stepdistill.json").write_text(json.dumps({"call": {"clip_skip": 1}}))
    found = load_teacher(tmp_path).encode(["a red ring"])
    assert torch.equal(found.text, known) and not torch.equal(known, plain)
    (tmp_path / "stepdistill.json").unlink()
    asked = load_teacher(Source(str(tmp_path), clip_skip=1))
    assert (torch.equal(asked.encode(["a red ring"]).text, known)
            and asked.stock_call(Inference(4)).call["clip_skip"] == 1)


def test_a_pipeline_without_clip_has_nothing_to_skip(tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", lambda self, prompt: None)
    with pytest.raises(RequestError, match="clip_skip is 1, but a call of StableDiffusionPipeline takes none"):
        load_teacher(Source(str(save_tiny(tmp_path)), clip_skip=1))


def test_a_pipeline_that_cannot_skip_a_layer_says_so(tmp_path):
    """Stable Diffusion's own looks for a part of its encoder that transformers 5 has not."""
    folder = save_tiny(tmp_path)
    (tmp_path / "stepdistill.json").write_text(json.dumps({"call": {"clip_skip": 1}}))
    if "text_model" in dir(tiny_pipeline().text_encoder):
        pytest.skip("transformers 4 has it")
    with pytest.raises(RequestError, match="skip 1 layers of its text encoder by clip_skip, .* leave clip_skip out"):
        load_teacher(folder)
