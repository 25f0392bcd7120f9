"""A student beside other adapters: a style's LoRA, a second student, and what is fused and still there."""
from __future__ import annotations

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from test_export import images, stock

from stepdistill.errors import RequestError
from stepdistill.export import export_student, load
from stepdistill.export.folder import _parted
from stepdistill.export.formats import component


def save_style(pipe, folder):
    """A LoRA as a trainer of styles leaves it; the pipeline is spent."""
    torch.manual_seed(3)
    name = component(pipe)
    pipe.components[name].add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False),
                                      "style")
    pipe.save_lora_weights(folder, **{f"{name}_lora_layers": get_peft_model_state_dict(pipe.components[name],
                                                                                       adapter_name="style")})
    return folder


def weights(pipe) -> dict[str, float]:
    """Of each active adapter."""
    layers = [m for m in pipe.components[component(pipe)].modules() if isinstance(m, BaseTunerLayer)]
    return {name: layer.scaling[name] for layer in layers for name in layer.active_adapters if name in layer.scaling}


@pytest.mark.parametrize("kind,to", [("epsilon", "lora"), ("epsilon", "comfyui"), ("sd3", "lora")])
def test_style_and_speed_together(make, teachers, tmp_path, kind, to):
    """Both are computed with: the picture is that of weights to which both were added, the style at its weight."""
    export_student(make(kind), to, tmp_path / "student", dtype="float32")
    style = save_style(stock(teachers[kind]), tmp_path / "style")
    pipe = stock(teachers[kind])
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters("style", 0.5)
    settings = load(pipe, tmp_path / "student")
    assert weights(pipe) == {"style": 0.5, "student": 1.5 if to == "lora" else pytest.approx(1.5)}
    both = images(pipe, **settings)

    fused = stock(teachers[kind])
    fused.load_lora_weights(style, adapter_name="style")
    fused.fuse_lora(lora_scale=0.5)
    fused.unload_lora_weights()
    again = load(fused, tmp_path / "student")
    torch.testing.assert_close(both, images(fused, **again), atol=1e-4, rtol=0)
    pipe.set_adapters("student", 1.0)
    assert (both - images(pipe, **settings)).abs().max() > 1e-3


def test_a_second_student_wants_a_name_of_its_own(make, teachers, tmp_path):
    export_student(make(), "lora", tmp_path)
    pipe = stock(teachers["epsilon"])
    settings = load(pipe, tmp_path)
    alone = images(pipe, **settings)
    with pytest.raises(RequestError, match='carries an adapter student already.*adapter_name="student-2"'):
        load(pipe, tmp_path)
    load(pipe, tmp_path, "other")
    assert {*weights(pipe)} == {"student", "other"}
    pipe.set_adapters("other")
    torch.testing.assert_close(images(pipe, **settings), alone, atol=1e-5, rtol=0)


def test_what_does_not_fit_leaves_the_style_as_it_was(make, teachers, tmp_path):
    export_student(make("sd3"), "lora", tmp_path / "student")
    pipe = stock(teachers["epsilon"])
    pipe.load_lora_weights(save_style(stock(teachers["epsilon"]), tmp_path / "style"), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    before = images(pipe, num_inference_steps=2, guidance_scale=1.0)
    with pytest.raises(RequestError, match="does not fit this StableDiffusionPipeline"):
        load(pipe, tmp_path / "student")
    assert weights(pipe) == {"style": 0.5}
    assert torch.equal(images(pipe, num_inference_steps=2, guidance_scale=1.0), before)


def test_a_style_that_is_fused_and_still_there_is_told_to_go(make, teachers, tmp_path):
    """peft computes no adapter beside a merged one: the student would be without effect, and nothing would say so."""
    export_student(make(), "lora", tmp_path / "student")
    pipe = stock(teachers["epsilon"])
    pipe.load_lora_weights(save_style(stock(teachers["epsilon"]), tmp_path / "style"), adapter_name="style")
    pipe.fuse_lora()
    with pytest.raises(RequestError, match="adapter style is fused into the weights.*call pipe.unload_lora_weights"):
        load(pipe, tmp_path / "student")
    pipe.unload_lora_weights()
    assert load(pipe, tmp_path / "student")["num_inference_steps"] == 4 and {*weights(pipe)} == {"student"}


@pytest.mark.parametrize("second", ["pixart", "dit"])
def test_adapters_of_pipelines_that_load_none_stay_too(make, teachers, tmp_path, second):
    export_student(make("pixart"), "lora", tmp_path / "first")
    export_student(make(second, **({"prompts": ("class 3",)} if second == "dit" else {})), "lora", tmp_path / "second")
    pipe = stock(teachers["pixart"])
    settings = load(pipe, tmp_path / "first")
    alone = images(pipe, **settings)
    if second == "dit":
        with pytest.raises(RequestError, match="does not fit"):
            load(pipe, tmp_path / "second", "other")
        assert torch.equal(images(pipe, **settings), alone)
    else:
        load(pipe, tmp_path / "second", "other")
        assert {*weights(pipe)} == {"student", "other"} and (images(pipe, **settings) - alone).abs().max() > 1e-3


def test_another_noise_is_said(make, teachers, tmp_path, caplog):
    """The keys of a LoRA fit any Stable Diffusion; what the network predicts is seen by the schedulers alone."""
    export_student(make("epsilon"), "lora", tmp_path)
    with caplog.at_level("WARNING", "stepdistill"):
        load(stock(teachers["epsilon"]), tmp_path)
        assert not [r for r in caplog.records if r.name == "stepdistill"]
        load(stock(teachers["v_prediction"]), tmp_path)
    # of one clock
    assert not _parted(EDMEulerScheduler(), CMStochasticIterativeScheduler(num_train_timesteps=100_001))
    said = [r.getMessage() for r in caplog.records if r.name == "stepdistill"]
    assert len(said) == 1 and "prediction_type is v_prediction here and epsilon there" in said[0]
