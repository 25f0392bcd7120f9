"""What `sample` and `bench` draw of: any pipeline of prompts, or one message; and no picture that is none."""
from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    TCDScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import save_tiny, save_tiny_sd3, tiny_pipeline, tiny_sd3
from transformers import CLIPConfig, CLIPImageProcessor

from stepdistill import api
from stepdistill.diffusion.draws import key
from stepdistill.errors import RequestError
from stepdistill.evaluation.plans import Target, evaluations, plans, serve
from stepdistill.export import read_settings
from stepdistill.models.sources import Source
from stepdistill.models.stock import cut
from stepdistill.run import benching
from stepdistill.run.targets import Opened, call_as_asked, open_target, teachers


def test_flows_with_dynamic_shifting_are_served(tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(save_tiny_sd3(tmp_path / "sd3"), text_encoder_3=None,
                                                    tokenizer_3=None)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe.save_pretrained(tmp_path / "dynamic")
    pipe.set_progress_bar_config(disable=True)
    serve(pipe.scheduler, 3)
    drawn = api.sample(tmp_path / "dynamic", "a red ring", steps=3)
    assert drawn[0].size == (16, 16)
    target = open_target(tmp_path / "dynamic", "it").target
    call = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "pt"}
    found, known = (p("a red ring", **call, generator=torch.Generator().manual_seed(0)).images
                    for p in (target.pipeline, pipe))
    assert torch.equal(found, known)


def test_a_number_of_steps_that_no_scheduler_serves_is_refused_still(tmp_path):
    with pytest.raises(RequestError, match="DDIMScheduler does not serve 2000 steps"):
        serve(DDIMScheduler(), 2000)


def test_a_pipeline_that_wants_more_than_a_prompt_is_refused_in_one_message(tmp_path):
    parts = tiny_pipeline().components
    own = {name: value for name, value in parts["unet"].config.items() if not name.startswith("_")}
    eight = UNet2DConditionModel(**own | {"in_channels": 8})
    StableDiffusionInstructPix2PixPipeline(**parts | {"unet": eight},
                                           requires_safety_checker=False).save_pretrained(tmp_path / "edit")
    network = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
                          down_block_types=("DownBlock2D",),
                          up_block_types=("UpBlock2D",))
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "alone")
    for name, said in (("edit", "InstructPix2PixPipeline draws nothing of a prompt alone, as `sample` and `bench` "
                        "ask it to: `image` input cannot be"),
                       ("alone", "a network without classes is asked for nothing, by the prompt \"\"; found 'a "
                        "red ring'")):
        with pytest.raises(RequestError, match=said):
            api.sample(tmp_path / name, "a red ring", steps=2)


def test_a_kin_that_draws_over_pictures_is_sampled_from_a_prompt(tmp_path):
    StableDiffusionImg2ImgPipeline(**tiny_pipeline().components,
                                   requires_safety_checker=False).save_pretrained(tmp_path / "over")
    save_tiny(tmp_path / "plain")
    drawn = [np.asarray(api.sample(tmp_path / name, "a red ring", steps=2)[0]) for name in ("over", "plain")]
    assert np.array_equal(*drawn)


def test_pictures_that_are_not_finite_are_not_written(tmp_path):
    folder = save_tiny(tmp_path / "teacher")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"conv_out.bias": torch.full((4,), float("nan"))}, file)
    with pytest.raises(RequestError, match=f"the pictures of {folder} are not finite"):
        api.sample(folder, "a red ring", steps=2, out=tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_black_pictures_are_said(tmp_path, capsys):
    folder = save_tiny(tmp_path / "teacher")
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"decoder.conv_out.weight": torch.zeros_like(state["decoder.conv_out.weight"]),
                       "decoder.conv_out.bias": torch.full_like(state["decoder.conv_out.bias"], -2.0)}, file)
    api.sample(folder, "a red ring", steps=2, out=tmp_path / "picture.png")
    assert not np.asarray(Image.open(tmp_path / "picture.png")).any()
    assert f"all pictures of {folder} are black" in re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.long
def test_a_safety_checker_that_stays_behind_is_said(tmp_path, stepdistill):
    pipe = tiny_pipeline()
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=config | {"image_size": 8, "patch_size": 4},
                                                      text_config=config, projection_dim=8))
    pipe.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(size=8, crop_size=8))
    pipe.save_pretrained(tmp_path / "teacher")
    run = api.train({"method": "lcm", "teacher": str(tmp_path / "teacher"), "student": {"lora": {"rank": 2}},
                     "steps": 2, "guidance": 2.0,
                     "data": {"images": "shapes", "batch": 2}, "train": {"updates": 1}}, out=tmp_path / "run")
    done = stepdistill("export", run, "--to", "pipeline")
    folder = run / "export" / "pipeline"
    assert done.returncode == 0 and "without the teacher's safety_checker, which its card says too" in done.stdout, (
        done.stderr)
    assert read_settings(folder)["dropped"] == ["safety_checker"]
    assert json.loads((folder / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert f"- not in this folder: `safety_checker` of `{tmp_path / 'teacher'}`" in (folder / "README.md").read_text()
    api.export(run, "lora")
    assert "not in this folder" not in (run / "export" / "lora" / "README.md").read_text()


FLOW = {"num_inference_steps": 2, "guidance_scale": 1.0, "sigmas": [1.0, 0.5]}


def test_a_student_is_sampled_in_the_steps_asked_for_or_says_what_it_was_made_for():
    pipe, say = tiny_sd3(), pytest.fail
    even = Target("even", pipe, "dmd2", FLOW)
    assert call_as_asked(even, 4, None, say) == FLOW | {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25]}
    assert call_as_asked(even, None, None, say) == call_as_asked(even, 2, None, say) == FLOW
    uneven = Target("uneven", pipe, "lcm", FLOW | {"sigmas": [1.0, 5 / 7]})
    with pytest.raises(RequestError, match="uneven was made for 2 steps, at the sigmas .*: it cannot be sampled in 4"):
        call_as_asked(uneven, 4, None, say)
    with pytest.raises(RequestError, match="made for 2 steps, which are folded into its weights"):
        call_as_asked(Target("flow map", pipe, "meanflow", FLOW, fixed_steps=True), 4, None, say)
    with pytest.raises(RequestError, match="one was made for 1 steps, at the times"):
        call_as_asked(Target("one", tiny_pipeline(), "dmd2", {"num_inference_steps": 1, "timesteps": [399]}),
                      2, None, say)


def test_a_flow_student_whose_call_takes_no_sigmas_has_its_own_steps_alone():
    """Its scheduler was made to give the times of that many; a few-step pipeline of others has a scheduler of its
    own."""
    call = {"num_inference_steps": 2, "guidance_scale": 1.0}
    ours, theirs = Target("ours", tiny_sd3(), "lcm", call), Target("theirs", tiny_sd3(), call=call)
    assert call_as_asked(ours, 2, None, pytest.fail) == call
    with pytest.raises(RequestError, match="ours was made for 2 steps, whose times its scheduler was made to give: "
                       "it cannot be sampled in 4"):
        call_as_asked(ours, 4, None, pytest.fail)
    assert call_as_asked(theirs, 4, None, pytest.fail) == call | {"num_inference_steps": 4}
    said = []
    assert [row.nfe for row in plans(ours, [1, 2, 4], [], [], said.append)] == [2] and len(said) == 2


def test_a_bench_runs_a_flow_student_at_each_count():
    said = []
    rows = plans(Target("even", tiny_sd3(), "dmd2", FLOW, given={"max_sequence_length": 0}), [1, 2, 4], [], [],
                 said.append)
    assert [(row.nfe, row.call["sigmas"]) for row in rows] == [(1, [1.0]), (2, [1.0, 0.5]),
                                                               (4, [1.0, 0.75, 0.5, 0.25])] and not said
    assert [evaluations(row) for row in rows] == [1, 2, 4]


def test_guidance_is_what_was_trained_or_a_note():
    said, call = [], {"num_inference_steps": 2, "guidance_scale": 1.0}
    student = Target("student", tiny_pipeline(), "lcm", call, trained=3.0)
    assert call_as_asked(student, None, 1.0, said.append) == call and not said
    assert call_as_asked(student, None, 2.0, said.append)["guidance_scale"] == 2.0
    assert said == ["student was trained in with a guidance scale of 3: 2 guides it once more, at two "
                    "evaluations a step"]
    for w in (-3.0, 0.5, float("nan")):
        with pytest.raises(RequestError, match="should be at least 1, which is none"):
            call_as_asked(student, None, w, said.append)
    reads = tiny_pipeline()
    config = {name: value for name, value in reads.unet.config.items() if not name.startswith("_")}
    reads.register_modules(unet=UNet2DConditionModel(**config | {"time_cond_proj_dim": 256}))
    told = Target("told", reads, "lcm", call, trained=(1.0, 4.0))
    assert call_as_asked(told, None, 4.0, said.append)["guidance_scale"] == 4.0
    with pytest.raises(RequestError, match="told was trained for a guidance scale of 1 to 4, which its network "
                       "reads; asked for was 5"):
        call_as_asked(told, None, 5.0, said.append)


def test_prompts_that_are_cut_are_counted_in_one_line(tmp_path, capsys):
    folder = save_tiny(tmp_path / "teacher")
    pipe = tiny_pipeline()
    limit = pipe.tokenizer.model_max_length
    fits, long = "a " * (limit - 2), "a " * (limit - 1)
    assert cut(type(pipe), pipe.components, [fits, long, "a"], {}) == (1, limit)
    assert cut(StableDiffusion3Pipeline, tiny_sd3(t5=True).components, ["a " * 255, "a " * 256], {}) == (1, 256)
    api.sample(folder, [long, "a", long], steps=1)
    said = [line for line in capsys.readouterr().err.splitlines() if "prompts are longer" in line]
    assert [line[9:] for line in said] == [f"2 of 3 prompts are longer than the {limit} tokens that a "
                                           "StableDiffusionPipeline reads: the rest of them has no effect"]


def test_a_teacher_that_cannot_be_loaded_does_not_refuse_its_student(tmp_path):
    opened, said = Opened(Target("student", tiny_pipeline(), "lcm", {}), Source("here"),
                          Source(str(tmp_path / "gone")), 2.0), []
    assert (teachers([opened], said.append) == [] and "does not stand beside its student: there is no "
            "folder or file" in said[0])


def test_the_teacher_of_a_student_stands_at_its_best(monkeypatch):
    """At few evaluations an unguided teacher has twice the steps: at the student's scale alone it would be a
    strawman."""
    asked = []
    opened = Opened(Target("student", tiny_pipeline(), "lcm", {}), Source("here"), Source("there"), 2.0)
    monkeypatch.setattr(benching, "open_target", lambda target, called, few_step, say, plugins: opened)
    monkeypatch.setattr(benching, "teachers", lambda opened, say: [])
    monkeypatch.setattr(benching.sweep, "bench",
                        lambda targets, nfe, samples, out, scales, *more, **others: asked.append(scales))
    api.bench("here", reference="shapes")
    api.bench("here", reference="shapes", guidance=[3.0])
    assert asked == [(1.0, 2.0), (3.0,)]


@pytest.mark.parametrize("scheduler,few", [(LCMScheduler, True), (TCDScheduler, True), (DDIMScheduler, False),
                                           (EulerDiscreteScheduler, False)])
def test_few_step_pipelines_of_others_keep_their_scheduler(tmp_path, scheduler, few):
    """Merged LCM and TCD show by their schedulers; of a merged Lightning, whose scheduler is a common one, it must be
    said."""
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "theirs")
    said = []
    found = open_target(tmp_path / "theirs", "theirs", say=said.append)
    assert (found.target.call is not None) == few == bool(said)
    asked = open_target(tmp_path / "theirs", "theirs", few_step=True, say=pytest.fail)
    rows = plans(asked.target, [1, 2, 4], [2.0], ["ddim"], pytest.fail)
    assert [(row.name, row.nfe, row.steps, row.guidance) for row in rows] == [("theirs", n, n, 1.0) for n in (1, 2, 4)]
    assert all(type(row.scheduler) is scheduler for row in rows) and teachers([asked]) == []
    assert [evaluations(row) for row in rows] == [1, 2, 4]
    call = {"num_inference_steps": 4, "guidance_scale": 1.0}
    drawn = rows[-1].images(["a red ring"], torch.tensor([0]), 0)
    known = pipe("a red ring", **call, generator=torch.Generator().manual_seed(key(0, "sample", 0)),
                 output_type="pt").images * 2 - 1
    torch.testing.assert_close(drawn, known, atol=1e-5, rtol=0)


def test_a_teacher_stands_beside_its_students_at_their_size(monkeypatch):
    monkeypatch.setattr("stepdistill.run.targets._pipeline", lambda source: tiny_pipeline())
    student = lambda name, **call: Opened(Target(name, tiny_pipeline(), "lcm", call), Source(name),
                                          Source("there"), 2.0)
    size = {"height": 8, "width": 24}
    assert teachers([student("one", **size), student("two", **size, num_inference_steps=4)])[0].given == size
    assert teachers([student("one", **size), student("two", height=8, width=8)])[0].given == {}
    assert teachers([student("one")])[0].given == {}
