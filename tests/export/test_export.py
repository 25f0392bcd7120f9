"""Exports are proved, and what the proof says is what a user of stock diffusers sees."""
from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from stepdistill.errors import RequestError
from stepdistill.export import export_student, load, open_export, read_settings
from stepdistill.export.comfyui import workflow
from stepdistill.export.folder import is_export
from stepdistill.export.formats import component
from stepdistill.models.roles import Full, Lora
from stepdistill.models.schedulers import StockCall
from stepdistill.models.sources import Source, absent_parts, index_at
from stepdistill.models.teacher import load_teacher

LORA = "pytorch_lora_weights.safetensors"
LCM = StockCall("LCMScheduler", {"original_inference_steps": 50}, {"num_inference_steps": 4, "guidance_scale": 1.0})
DDIM = StockCall("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True},
                 {"num_inference_steps": 4, "guidance_scale": 3.0})
TCD = StockCall("TCDScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 1.0, "eta": 0.3})


BEGUN = StockCall("LCMScheduler", {"original_inference_steps": 1},
                  {"num_inference_steps": 1, "guidance_scale": 1.0, "timesteps": [625]})
FLOW_BEGUN = StockCall("FlowMatchLCMScheduler", {"shift": 1.0}, {"num_inference_steps": 1, "guidance_scale": 1.0,
                                                                 "sigmas": [0.626]})
FLOW_EULER = StockCall("FlowMatchEulerDiscreteScheduler", {},
                       {"num_inference_steps": 2, "guidance_scale": 3.0, "sigmas": [1.0, 0.5]})


def stock(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, **absent_parts(index_at(Source(str(folder)))))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_tensor(file: str) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


def images(pipe, **settings) -> torch.Tensor:
    torch.manual_seed(5)                    # from which the stock SD3 takes its steps' noise
    return pipe("a red ring", generator=torch.Generator().manual_seed(5), output_type="pt", **settings).images


@pytest.mark.parametrize("kind,to,setting,guidance_embedding,guidance,inference", [
    ("epsilon", "lora", Lora(4, 6.0), False, None, LCM), ("v_prediction", "lora", Lora(4, 6.0), False, None, LCM),
    ("epsilon", "lora", Lora(3), False, None, DDIM), ("v_prediction", "lora", Lora(3), False, None, TCD),
    ("v_prediction", "lora", Lora(4, 6.0), True, 3.3, LCM),
    ("epsilon", "lora", Lora(4, 6.0, ("to_q", "time_embedding.linear_1")), True, 7.5, LCM),
    ("v_prediction", "comfyui", Lora(4, 6.0), False, None, LCM), ("epsilon", "comfyui", Lora(4, 6.0), True, 3.3, LCM),
    ("v_prediction", "pipeline", Full(), False, None, LCM), ("epsilon", "pipeline", Full(), True, 4.0, LCM),
    ("v_prediction", "pipeline", Lora(4, 6.0), True, 2.0, DDIM),
    ("v_prediction", "lora", Lora(4, 6.0), False, None, BEGUN), ("epsilon", "pipeline", Full(), False, None, BEGUN),
    ("sd3", "lora", Lora(4, 6.0), False, None, FLOW_BEGUN),
    ("sd3", "lora", Lora(4, 6.0), False, None, None), ("sd3-t5", "lora", Lora(4, 6.0), False, None, FLOW_EULER),
    ("sd3", "pipeline", Full(), False, None, None), ("sd3", "pipeline", Lora(4, 6.0), False, None, FLOW_EULER)])
def test_every_form_is_proved(make, tmp_path, kind, to, setting, guidance_embedding, guidance, inference):
    proof = export_student(make(kind, setting, guidance_embedding, inference), to, tmp_path / "out", guidance)
    assert proof.difference < 1e-5
    assert proof.images.std() > 0.05
    settings = read_settings(tmp_path / "out")
    assert (settings["proof"]["difference"] == proof.difference and settings["role"] == "ema"
            and settings["format"] == to)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_the_folder_holds_what_the_design_says(make, tmp_path, teachers):
    student = make()
    export_student(student, "lora", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {LORA, "scheduler", "stepdistill.json", "README.md", "samples.png"}
    settings = json.loads((tmp_path / "stepdistill.json").read_text())
    assert settings["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert (settings["steps"], settings["method"], settings["teacher"]) == (4, "lcm", str(teachers["epsilon"]))
    with safe_open(tmp_path / LORA, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 6.0


def test_files_have_the_rights_that_the_umask_gives(make, tmp_path):
    before = os.umask(0o022)
    try:
        export_student(make(), "lora", tmp_path / "out")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").rglob("*") if path.is_file()} == {"0o644"}


def test_the_scheduler_keeps_the_teachers_noise(make, tmp_path, teachers):
    student = make("v_prediction")
    export_student(student, "lora", tmp_path)
    config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    teacher = stock(teachers["v_prediction"]).scheduler
    assert config["_class_name"] == "LCMScheduler" and config["original_inference_steps"] == 50
    assert config["prediction_type"] == "v_prediction"
    assert torch.equal(diffusers.LCMScheduler.from_pretrained(tmp_path, subfolder="scheduler").alphas_cumprod,
                       teacher.alphas_cumprod)


def test_load_gives_the_settings_of_a_plain_call(make, tmp_path, teachers):
    proof = export_student(make(), "lora", tmp_path)
    pipe = stock(teachers["epsilon"])
    before = images(pipe, num_inference_steps=4, guidance_scale=1.0)
    settings = load(pipe, tmp_path)
    assert (settings == {"num_inference_steps": 4, "guidance_scale": 1.0} and type(pipe.scheduler).__name__
            == "LCMScheduler")
    again = pipe(["a large red ring", "a small blue square on green", "two triangles", "a large red ring"],
                 generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images
    torch.testing.assert_close(again, proof.images, atol=1e-5, rtol=0)
    assert (images(pipe, **settings) - before).abs().max() > 0.05


def test_a_pipeline_export_loads_into_its_base(make, tmp_path, teachers):
    export_student(make(setting=Full(), guidance_embedding=True), "pipeline", tmp_path, 4.0)
    pipe = stock(teachers["epsilon"])
    settings = load(pipe, tmp_path)
    whole, same = open_export(tmp_path)
    assert settings == same == {"num_inference_steps": 4, "guidance_scale": 4.0}
    torch.testing.assert_close(images(pipe, **settings), images(whole, **settings), atol=1e-5, rtol=0)
    assert (images(pipe, **settings) - images(pipe, **{**settings, "guidance_scale": 1.5})).abs().max() > 1e-3


@pytest.mark.parametrize("cls,kind,guidance", [
    *((cls, "epsilon", guidance) for cls in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline,
                                             StableDiffusionInpaintPipeline)
      for guidance in (None, 3.3)),
    *((cls, "sd3", None) for cls in (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline,
                                     StableDiffusion3InpaintPipeline))])
def test_the_lora_runs_in_sibling_pipelines_weighted_and_fused(make, tmp_path, teachers, cls, kind, guidance):
    export_student(make(kind, guidance_embedding=guidance is not None), "lora", tmp_path, guidance)
    pipe = stock(teachers[kind])
    settings = load(pipe, tmp_path)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 16, 16).index_fill_(3, torch.arange(8), 1.0)
    extra = {"image": picture, "strength": 0.75} if "Img2Img" in cls.__name__ else \
        {"image": picture, "mask_image": mask, "height": 16, "width": 16} if "Inpaint" in cls.__name__ else {}
    pipe = cls.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)

    def at(weight: float) -> torch.Tensor:
        pipe.set_adapters("student", weight)
        return images(pipe, **extra, **settings)

    none, half, full = at(0.0), at(0.5), at(1.0)
    span = (full - none).norm()
    assert span > 0.5 and (half - none).norm() < span and (half - full).norm() < span
    pipe.fuse_lora()
    fused = images(pipe, **extra, **settings)
    torch.testing.assert_close(fused, full, atol=1e-4, rtol=0)
    pipe.unload_lora_weights()
    torch.testing.assert_close(images(pipe, **extra, **settings), full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind,to,guidance", [
    ("epsilon", "lora", None), ("epsilon", "lora", 3.3), ("epsilon", "comfyui", None), ("epsilon", "pipeline", None),
    ("sd3", "lora", None), ("sd3", "pipeline", None), ("sana", "lora", 3.3), ("pixart", "lora", None),
    ("pixart", "lora", 3.3),
    ("pixart", "pipeline", None)])
def test_the_snippet_of_the_card_runs(make, tmp_path, monkeypatch, kind, to, guidance):
    setting = Full() if to == "pipeline" else Lora(4, 6.0)
    export_student(make(kind, setting, guidance_embedding=guidance is not None), to, tmp_path / "out", guidance)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    pipe, settings = open_export(tmp_path / "out")
    torch.manual_seed(0)
    expected = pipe("a large red ring", generator=torch.Generator().manual_seed(0), output_type="pt",
                    **settings).images[0]
    torch.testing.assert_close(to_tensor("sample.png"), expected, atol=0.51 / 255, rtol=0)
    beside, _ = open_export(tmp_path / "out", fused=False)
    layers = [any("lora" in name for name, _ in p.components[component(p)].named_modules()) for p in (pipe, beside)]
    assert layers == [False, to != "pipeline"]
    torch.manual_seed(0)
    again = beside("a large red ring", generator=torch.Generator().manual_seed(0), output_type="pt",
                   **settings).images[0]
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=0)


def test_what_an_sd3_export_says(make, tmp_path, teachers):
    export_student(make("sd3"), "lora", tmp_path / "lora")
    settings = read_settings(tmp_path / "lora")
    assert settings["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0, "sigmas": [1.0, 0.75, 0.5, 0.25],
                                "max_sequence_length": 0}
    assert settings["teacher_call"] == {"max_sequence_length": 0} and settings["without"] == ["text_encoder_3",
                                                                                              "tokenizer_3"]
    assert settings["global_noise"] and settings["scheduler"] == "FlowMatchLCMScheduler"
    scheduler = json.loads((tmp_path / "lora/scheduler/scheduler_config.json").read_text())
    assert scheduler["shift"] == 2.0                     # the student's, not the teacher's 3
    with safe_open(tmp_path / "lora" / LORA, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 6.0
        assert all(key.startswith("transformer.") for key in file.keys())


def test_an_exported_pipeline_is_a_teacher_whose_calls_are_its_teachers(make, tmp_path, teachers):
    """A stepdistill.json stands beside both, and neither is taken for the other."""
    export_student(make("sd3", Full()), "pipeline", tmp_path)
    family = load_teacher(tmp_path)
    assert family.call == {"max_sequence_length": 0} and family.encode(["a"]).text.shape[1] == 20
    assert is_export(tmp_path) and not is_export(teachers["sd3"]) and not is_export(teachers["epsilon"])
    with pytest.raises(RequestError, match="no export folder: its stepdistill.json names no method"):
        read_settings(teachers["sd3"])


def test_a_student_that_has_seen_one_scale_leaves_at_it(make, tmp_path):
    student = make(guidance_embedding=True, guidance=2.0)
    for w in (1.0, 5.0):
        with pytest.raises(RequestError, match=f"--guidance {w:g} is not what this student was trained for: it "
                           "has seen the scale 2 alone"):
            export_student(student, "lora", tmp_path, w)
    export_student(student, "lora", tmp_path)
    assert read_settings(tmp_path)["guidance"] == 2.0


def test_kohya_keys_are_those_comfyui_maps(make, tmp_path):
    student = make()
    export_student(student, "comfyui", tmp_path)
    state = load_file(tmp_path / read_settings(tmp_path)["weights"])
    assert {key.split(".", 1)[1] for key in state} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert {key.split(".")[0] for key in state} == {"lora_unet_" + m.replace(".", "_") for m in student.lora.modules}
    assert state["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha"] == 6.0


NODES = {                          # of ComfyUI's core: the inputs that each asks for, and what it gives
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": str,
     "strength_model": float}, ("MODEL",)), "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": str, "zsnr": bool},
                                                                      ("MODEL",)),
    "CLIPTextEncode": ({"clip": "CLIP", "text": str}, ("CONDITIONING",)),
    "KSamplerSelect": ({"sampler_name": str}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": str}, ("SIGMAS",)),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "SamplerCustom": ({"model": "MODEL", "add_noise": bool, "noise_seed": int, "cfg": float, "positive": "CONDITIONING",
                       "negative": "CONDITIONING",
                       "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"}, ("LATENT", "LATENT")),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, ())}


@pytest.mark.parametrize("kind,inference,sampler", [("epsilon", LCM, "lcm"), ("v_prediction", DDIM, "euler"),
                                                    ("epsilon", TCD, None)])
def test_the_workflow_is_the_students_own_call(make, tmp_path, kind, inference, sampler):
    """Every link is of the kind that its end asks for; the sigmas are sqrt(1 / alphas_cumprod - 1) at the student's
    timesteps."""
    student = make(kind, stock=inference)
    export_student(student, "comfyui", tmp_path)
    if sampler is None:
        assert not (tmp_path / "workflow.json").exists() and "workflow.json" not in (tmp_path / "README.md").read_text()
        return
    nodes, settings = json.loads((tmp_path / "workflow.json").read_text()), read_settings(tmp_path)
    for node in nodes.values():
        asked, _ = NODES[node["class_type"]]
        assert set(asked) == set(node["inputs"])
        for name, kind_of in asked.items():
            given = node["inputs"][name]
            assert (NODES[nodes[given[0]]["class_type"]][1][given[1]] == kind_of if isinstance(kind_of, str)
                    else type(given) is kind_of)
    by_kind = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert (by_kind["KSamplerSelect"]["sampler_name"] == sampler and by_kind["LoraLoaderModelOnly"]["lora_name"]
            == settings["weights"])
    assert (by_kind["SamplerCustom"]["cfg"] == settings["scale"] and ("ModelSamplingDiscrete" in by_kind)
            == (kind == "v_prediction"))
    kept = student.teacher.scheduler.alphas_cumprod.double()[torch.tensor(settings["told_times"]).long()]
    sigmas = [float(number) for number in by_kind["ManualSigmas"]["sigmas"].split(", ")]
    assert sigmas == pytest.approx([*(1 / kept - 1).sqrt().tolist(), 0.0], rel=1e-5)


def test_a_schedule_that_ends_in_pure_noise_begins_at_comfyuis_last_sigma():
    settings = {"scheduler": "DDIMScheduler", "teacher": "base", "weights": "x.safetensors",
                "prediction": "v_prediction", "scale": 1, "pipeline": "StableDiffusionPipeline", "call": {}}
    nodes = {node["class_type"]: node["inputs"] for node in workflow(settings, [float("inf"), 1.0], "a",
                                                                     (8, 16)).values()}
    assert (nodes["ManualSigmas"]["sigmas"] == "4518.760000, 1.000000, 0.000000"
            and nodes["ModelSamplingDiscrete"]["zsnr"] is True)


def test_a_refuted_export_leaves_nothing(make, tmp_path):
    student, other = make(), make(setting=Lora(rank=4, alpha=3.0))
    with pytest.raises(RequestError, match=r"differs from this run's own sampler by .* where 1e-04 is allowed"):
        export_student(replace(student, role=other.role), "lora", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_refuted_export_keeps_the_earlier_one(make, tmp_path):
    student, other = make(), make(setting=Lora(rank=2))
    export_student(student, "lora", tmp_path / "out")
    before = (tmp_path / "out" / LORA).read_bytes()
    with pytest.raises(RequestError):
        export_student(replace(student, role=other.role), "lora", tmp_path / "out")
    assert (tmp_path / "out" / LORA).read_bytes() == before
    with pytest.raises(RequestError, match="another run"):
        export_student(replace(student, run="run-2"), "lora", tmp_path / "out")
    export_student(other, "lora", tmp_path / "out")
    assert (tmp_path / "out" / LORA).read_bytes() != before


def test_a_lora_without_its_alpha_is_refuted(make, tmp_path, monkeypatch):
    whole = StableDiffusionPipeline.save_lora_weights
    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights",
                        staticmethod(lambda *args, unet_lora_adapter_metadata, **options: whole(*args, **options)))
    with pytest.raises(RequestError, match="differs"):
        export_student(make(), "lora", tmp_path / "out")


def test_a_loader_that_loses_a_key_is_refuted(make, tmp_path, monkeypatch):
    from stepdistill.export import formats
    whole = formats.kohya
    monkeypatch.setattr(formats, "kohya", lambda lora: {k: v for k, v in whole(lora).items() if "mid_block" not in k})
    with pytest.raises(RequestError, match="missing"):
        export_student(make(), "comfyui", tmp_path / "out")


@pytest.mark.parametrize("to,options,guidance,message", [
    ("onnx", {}, None, "there are lora, pipeline, comfyui"),
    ("lora", {"setting": Full()}, None, "--to pipeline"),
    ("lora", {"guidance_embedding": True}, None, "--guidance W"),
    ("lora", {}, 3.0, "leave --guidance out"),
    ("lora", {"guidance_embedding": True, "guidance": (2.0, 5.0)}, 9.0, "choose from 2 to 5")])
def test_requests_that_cannot_be_served(make, tmp_path, to, options, guidance, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        export_student(make(**options), to, tmp_path / "out", guidance)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_changes_nothing(make, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(diffusers.LCMScheduler, "save_pretrained", full)
    with pytest.raises(RequestError, match="No space left on device; nothing there was changed"):
        export_student(make(), "lora", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(make, tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(RequestError, match="no export folder"):
        export_student(make(), "lora", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


@pytest.mark.parametrize("level", ["WARNING", "ERROR"])
def test_load_refuses_a_base_that_does_not_fit(make, tmp_path, caplog, level):
    """At the level at which the commands keep diffusers silent, too."""
    from tiny import tiny_pipeline
    caplog.set_level(level, "diffusers")
    export_student(make(), "lora", tmp_path)
    pipe = tiny_pipeline()
    pipe.register_modules(unet=diffusers.UNet2DConditionModel.from_config(pipe.unet.config, block_out_channels=(8, 32)))
    with pytest.raises(RequestError, match="does not fit"):
        load(pipe, tmp_path)
    fewer = diffusers.UNet2DConditionModel.from_config(
        tiny_pipeline().unet.config, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    pipe = tiny_pipeline()
    pipe.register_modules(unet=fewer)
    with pytest.raises(RequestError, match="does not fit"):
        load(pipe, tmp_path)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    with pytest.raises(RequestError, match="no export folder"):
        load(pipe, tmp_path / "scheduler")


def test_the_card_shows_what_was_measured(make, tmp_path):
    row = {"target": "lcm", "method": "lcm", "nfe": 4, "steps": 4, "guidance": 1.0, "samples": 10, "seed": 0,
           "metrics": {"fd": 1.234, "all_attributes": 0.875}}
    real = {**row, "target": "real", "nfe": None, "guidance": None, "metrics": {"fd": 0.01}}
    results = {"protocol": {"id": "abc", "features": "clip", "reference": "shapes"}, "rows": [row, real]}
    export_student(make(results=results), "lora", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| lcm | 4 | 1 | 1.23 | 0.875 |" in text and "| real |  |  | 0.01 |  |" in text
    front = text.split("---")[1]
    # the Hub refuses paths
    assert all(f"{key}: " in front for key in ("tags", "license")) and "base_model" not in front
    export_student(make(base_model=Source("someone/a-model"), results=results), "lora", tmp_path / "hub")
    assert 'base_model: "someone/a-model"\n' in (tmp_path / "hub/README.md").read_text()


@pytest.mark.parametrize("inference,said", [
    (LCM, "steps 4, cfg 1, denoise 1, sampler_name `lcm` and none of its schedulers"),
    (replace(LCM, config={"original_inference_steps": 4}), "sampler_name `lcm` scheduler `simple`, whose time steps "
                                                           "are those this student was made for: 999, 749, 499, 249."),
    (DDIM, "steps 4, cfg 3, denoise 1, sampler_name `euler` scheduler `simple`"),
    (TCD, "sampler_name none of its own: no sampler of ComfyUI's core does what a TCDScheduler does")])
def test_the_card_says_what_to_set_in_comfyui(make, tmp_path, inference, said):
    export_student(make("v_prediction", stock=inference), "comfyui", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert said in text and "put *ModelSamplingDiscrete* with `v_prediction` before the sampler" in text, (
        text.split("## ComfyUI")[1])
