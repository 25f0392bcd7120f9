"""DiT: classes as prompts, one size of pictures, and what it cannot be asked for."""
from __future__ import annotations

import pytest
import torch
from families.dit import tiny_dit

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.models.teacher import load_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    tiny_dit().save_pretrained(folder)
    return folder


def test_prompts_are_classes(folder):
    teacher = load_teacher(folder)
    cond = teacher.encode(["class 3", "class 999", "tench", "Tinca tinca", "goldfish"])
    assert cond.label.tolist() == [3, 999, 0, 0, 1] and cond.null.label.tolist() == [1000] * 5
    assert teacher.encode([""]).label.tolist() == [1000]
    for prompt in ("class 1000", "a red ring", "class three"):
        with pytest.raises(RequestError, match="class 0 to class 999 or by a label of the pipeline "
                           f".*goldfish.*{prompt}"):
            teacher.encode([prompt])


def test_its_calls_say_no_size(folder):
    assert (load_teacher(folder, resolution=16).call == {} and load_teacher(folder, resolution=(16, 16)).latent_shape
            == (4, 8, 8))
    for size in (32, (16, 32)):
        with pytest.raises(RequestError, match="16 x 16 pixels, and no call of its pipeline asks for others"):
            load_teacher(folder, resolution=size)


@pytest.mark.parametrize("name, settings, steps, reason", [
    ("scm", {}, 2, "asks its pipeline for timesteps, which a call of DiTPipeline does not take"),
    ("tcd", {}, 2, "asks its pipeline for eta, which a call of DiTPipeline does not take"),
    ("lcm", {"told": True}, 2, "student reads w beside its time, but this teacher's network has no one place"),
    ("sid", {"start_time": 0.626}, 1, "settings.start_time is 0.626, where no sampling can begin: it asks its pipeline "
     "for timesteps"),
    ("dmd2", {}, 2, None)])
def test_what_its_students_cannot_be(folder, tmp_path, name, settings, steps, reason):
    recipe = {"method": name, "teacher": str(folder), "settings": settings, "steps": steps, "train": {"updates": 1},
              "data": {"samples": {"prompts": ["class 1"], "steps": 2}, "count": 2, "batch": 2},
              "evaluate": {"prompts": ["class 1"]}}
    if reason is None:
        api.train(recipe, out=tmp_path)
        return
    with pytest.raises(RequestError, match=reason):
        api.train(recipe, out=tmp_path)


def test_a_start_time_that_no_call_takes_is_refused_before_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.models.teacher._with_weights", lambda *given: pytest.fail("weights were read"))
    recipe = {"method": "sid", "teacher": str(folder), "settings": {"start_time": 0.626}, "steps": 1,
              "train": {"updates": 1},
              "data": {"prompts": ["class 1"], "batch": 2}}
    with pytest.raises(RequestError, match="settings.start_time is 0.626, where no sampling can begin"):
        api.train(recipe, out=tmp_path / "run")


def test_a_network_saved_under_the_name_of_old_versions(folder, tmp_path):
    """As released DiTs and PixArts name theirs."""
    tiny_dit().save_pretrained(tmp_path)
    for file in ("model_index.json", "transformer/config.json"):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text.replace("DiTTransformer2DModel", "Transformer2DModel"))
    teacher, now = load_teacher(tmp_path), load_teacher(folder)
    meta = load_teacher(tmp_path, device="meta")
    assert (type(teacher.network) is type(meta.network) is type(now.network)
            and meta.feature_shapes == now.feature_shapes)
    assert all(torch.equal(a, b) for a, b in zip(teacher.network.parameters(), now.network.parameters(), strict=True))


def test_a_network_of_other_classes(tmp_path):
    pipeline = tiny_dit()
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, num_embeds_ada_norm=10)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="its network knows 10 classes, and its pipeline subtracts class 1000"):
        load_teacher(tmp_path)
