"""Wan, whose samples are videos and whose call takes no times: what the matrix does not ask."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler, WanPipeline
from PIL import Image
from tiny import tiny_pipeline

from stepdistill import api
from stepdistill.diffusion.sampler import Sampler
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.errors import RequestError
from stepdistill.methods.base import Inference
from stepdistill.models.heads import TokenHead, head
from stepdistill.models.schedulers import own_grid, stock_call, stock_scheduler
from stepdistill.models.stock import pictures, some_frames
from stepdistill.models.teacher import load_teacher

from .wan import CALL, DATA, tiny

PROMPTS = ["a red ring", "a blue square"]


def saved(folder: Path, pipe: WanPipeline | None = None, **call: Any) -> Path:
    (tiny() if pipe is None else pipe).save_pretrained(folder)
    (folder / "stepdistill.json").write_text(json.dumps({"call": {"max_sequence_length": 8, **call}}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("wan") / "wan", **CALL, height=16, width=32)


def recipe(teacher: Path, method: str = "lcm", **more: Any) -> dict[str, Any]:
    entries = {"steps": 2, "guidance": 2.0, "data": dict(DATA), "evaluate": {"prompts": PROMPTS},
               "train": {"updates": 1}}
    return {"method": method, "teacher": str(teacher), "student": {"lora": {"rank": 2}}, **entries, **more}


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 25])
def test_a_scheduler_makes_shifted_even_times_of_their_number(shift, steps):
    even = torch.tensor([1 - i / steps for i in range(steps)], dtype=torch.float64)
    times = shift * even / (1 + (shift - 1) * even)
    teacher = FlowMatchEulerDiscreteScheduler(shift=5.0, use_dynamic_shifting=True)
    for noise, kind in ((0.0, FlowMatchEulerDiscreteScheduler), (1.0, FlowMatchLCMScheduler)):
        stock = stock_call(Inference(steps, noise=noise, shift=shift), RectifiedFlow(), sigmas=False)
        assert stock.call == {"num_inference_steps": steps, "guidance_scale": 1.0}
        scheduler = stock_scheduler(stock.scheduler, stock.config, teacher)
        assert type(scheduler) is kind
        sampler = Sampler.of_call(scheduler, steps, RectifiedFlow(), stock.call)
        torch.testing.assert_close(sampler.times, times, rtol=0, atol=5e-7)
        torch.testing.assert_close(sampler.landings[:-1], times[1:], rtol=0, atol=5e-7)


def test_even_times_need_no_shift_and_an_end():
    assert own_grid([1, 0.75, 0.5, 0.25]) == {"shift": 1.0, "shift_terminal": 0.25}
    assert own_grid([1.0]) == {"shift": 1.0, "shift_terminal": None}


@pytest.mark.parametrize("times", [(0.9,), (0.999, 0.5), (1, 0.76, 0.5, 0.26)])
def test_other_times_are_refused(times):
    with pytest.raises(ValueError, match="takes no times.*asks for " + re.escape(f"{times[0]:.4g}")):
        own_grid(times)


@pytest.mark.parametrize("changed, path, says", [
    ({"method": "scm"}, "steps", "takes no times"),
    ({"settings": {"nodes": 50}, "steps": 4}, "steps", "Choose steps that divide its nodes"),
    ({"data": {"images": "shapes", "count": 4, "batch": 2}}, "data.images", "let frames be 1"),
    ({"evaluate": {"reference": "shapes"}}, "evaluate.reference", "figures are of pictures"),
    ({"method": "add"}, "method", "reads features of pictures"),
])
def test_what_cannot_be_is_refused_before_weights_are_read(folder, monkeypatch, changed, path, says):
    monkeypatch.setattr("stepdistill.run.setup.load_teacher", None)
    with pytest.raises(RequestError, match=f": {path} .*{says}"):
        api.train(recipe(folder, **changed))


def test_frames_are_of_videos(tmp_path, folder, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "sd")
    with pytest.raises(RequestError, match="makes no videos"):
        load_teacher(tmp_path / "sd", frames=5)
    teacher = load_teacher(folder, resolution=(32, 48), frames=9)
    assert teacher.latent_shape == (4, 3, 4, 6) and (teacher.resolution, teacher.frames) == ((32, 48), 9)
    assert teacher.call == {"max_sequence_length": 8, "height": 32, "width": 48, "num_frames": 9}
    with pytest.raises(RequestError, match="a multiple of 4 frames and one, such as 5 or 81; found 6"):
        load_teacher(folder, frames=6)
    plain = load_teacher(saved(tmp_path / "plain"), device="meta")
    assert plain.call == {"max_sequence_length": 8, "height": 480, "width": 832, "num_frames": 81}
    assert plain.latent_shape == (4, 21, 60, 104)
    monkeypatch.setattr("stepdistill.run.setup.load_teacher", None)
    with pytest.raises(RequestError, match=": frames cannot be: .*makes no videos"):
        api.train(recipe(tmp_path / "sd", frames=5))


def test_two_networks_are_refused(tmp_path):
    pipe = tiny()
    parts = pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.scheduler
    two = WanPipeline(*parts, pipe.transformer, tiny().transformer, boundary_ratio=0.875)
    only = WanPipeline(*parts, None, pipe.transformer, boundary_ratio=0.9)
    for name, made, says in (("two", two, "second network for the less noisy"), ("only", only, "names no transformer")):
        for device in ("cpu", "meta"):
            with pytest.raises(RequestError, match=says):
                load_teacher(saved(tmp_path / name, made), device=device)


def test_one_time_a_sample_is_one_time_a_token():
    """What the pipeline of Wan 2.2 tells its network for each token, we tell it once."""
    network, x = tiny(residual=True).transformer, torch.randn(2, 6, 2, 4, 6)
    text, t = torch.randn(2, 8, 16), torch.tensor([900.0, 123.4])
    with torch.no_grad():
        once, each = (network(x, time, text, return_dict=False)[0]
                      for time in (t, t[:, None].expand(2, 12).contiguous()))
    torch.testing.assert_close(once, each, rtol=1e-5, atol=1e-6)


def test_heads_of_videos_see_frames_as_an_axis():
    logits = head((16, 3, 8, 12))(torch.randn(2, 16, 3, 8, 12))
    assert logits.shape == (2, 1, 1, 2, 3)
    assert TokenHead((16, 3, 8, 12), 5)(torch.randn(2, 16, 3, 8, 12), torch.randn(2, 5)).shape == (2, 3 * 8 * 12)


def test_frames_to_look_at():
    videos = torch.arange(81.0).reshape(1, 81, 1, 1, 1)
    assert some_frames(videos).flatten().tolist() == [0, 11, 23, 34, 46, 57, 69, 80]
    assert some_frames(videos[:, :5]).flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("residual", [False, True])
def test_pixels_beyond_the_range_find_their_way_back(tmp_path, residual):
    teacher = load_teacher(saved(tmp_path / "t", tiny(residual), num_frames=5, height=32, width=32))
    teacher.codec.network.decoder.conv_out.weight.data *= 10
    latents = torch.randn(1, *teacher.latent_shape).requires_grad_()
    pixels = teacher.pixels(latents)
    assert pixels.shape == (1, 5, 3, 32, 32) and pixels.abs().max() > 1
    pixels.square().sum().backward()
    assert (latents.grad != 0).all()
    with torch.no_grad():
        stock = teacher.codec.network.decode(latents / teacher.codec.scale + teacher.codec.shift).sample.transpose(1, 2)
    torch.testing.assert_close(teacher.decode(latents), stock, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_student_of_a_unipc_teacher_leaves_with_its_own_times(tmp_path):
    """As released: a solver of diffusion that is told of a flow. The student takes four shifted steps with fresh
    noise."""
    pipe = tiny()
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    teacher = saved(tmp_path / "teacher", pipe)
    settings = {"settings": {"nodes": 48, "shift": 3.0}, "steps": 4, "resolution": [16, 32], "frames": 5}
    run = api.train(recipe(teacher, **settings), out=tmp_path / "run")
    exported = api.export(run, to="lora", dtype="float32")
    said = json.loads((exported / "stepdistill.json").read_text(encoding="utf-8"))
    size = {"height": 16, "width": 32, "num_frames": 5}
    assert said["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 8, **size}
    assert said["told_times"] == pytest.approx([1000, 900, 750, 500], abs=1e-3) and said["proof"]["images"] == 1
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert ".frames[0]" in card and 'export_to_video(frames, "sample.mp4"' in card and "images[0]" not in card
    assert '"text-to-video"' in card
    with Image.open(exported / "samples.png") as sheet:
        assert sheet.size == (5 * 32, 16)
    with Image.open(next((run / "samples").glob("*.png"))) as preview:     # two rows for each of two prompts
        assert preview.height == 4 * (3 * 16 + 4) + 4
    drawn = api.sample(exported, PROMPTS, out=tmp_path / "sample.png")
    assert [len(frames) for frames in drawn] == [5, 5] and drawn[0][0].size == (32, 16)
    with pytest.raises(RequestError, match="made for 4 steps, whose times its scheduler was made to give: it cannot "
                       "be sampled in 2"):
        api.sample(exported, PROMPTS, steps=2)
    row = next(row for row in api.bench(exported, nfe=[4], samples=2, prompts=PROMPTS, out=tmp_path / "bench")["rows"]
               if row["target"] == "lora")
    assert row["nfe"] == 4 and row["metrics"]["motion"] > 0 and row["metrics"]["motion_ratio"] > 0


def test_a_bench_is_beside_the_teachers_own_videos(folder, tmp_path, capsys):
    results = api.bench(folder, nfe=[4], samples=4, prompts=PROMPTS, out=tmp_path / "bench")
    assert ([row["target"] for row in results["rows"]][0].startswith("teacher:") and "against the teacher's "
            "own pictures" in capsys.readouterr().err)
    assert all(row["metrics"]["motion"] > 0 and "fd_frames" in row["metrics"] for row in results["rows"])
    assert all(row["metrics"]["motion_ratio"] > 0 for row in results["rows"][1:])
    for more in ({"reference": "shapes"}, {"few_step": ["assets/shapes-sd"]}):
        with pytest.raises(RequestError, match="makes videos, which are measured beside their teacher's own: leave "
                           "--reference and targets that"):
            api.bench(folder, nfe=[4], samples=100, prompts=PROMPTS, out=tmp_path / "other", **more)


@pytest.mark.long
def test_pictures_are_videos_of_one_frame(tmp_path, folder):
    entries = {"data": {"images": "shapes", "count": 4, "batch": 2}, "frames": 1, "resolution": [16, 32]}
    assert api.train(recipe(folder, **entries), out=tmp_path / "run").is_dir()
    teacher = load_teacher(folder, resolution=(16, 32), frames=1)
    assert teacher.encode_images(torch.zeros(2, 3, 16, 32)).shape == (2, 4, 1, 2, 4)


@pytest.mark.long
@pytest.mark.parametrize("method, settings, data", [
    ("reflow", {}, {"pairs": DATA["samples"], "count": 4, "batch": 2}),
    ("dmd2", {"gan_weight": 0.0}, {"prompts": PROMPTS, "batch": 2})])
def test_methods_on_pairs_and_prompts(tmp_path, folder, method, settings, data):
    """One of even steps without fresh noise, and one that reads no data."""
    run = api.train(recipe(folder, method, data=data, settings=settings), out=tmp_path / "run")
    proof = json.loads((api.export(run, to="pipeline") / "stepdistill.json").read_text(encoding="utf-8"))["proof"]
    assert proof["difference"] <= 1e-4


def test_in_16_bits_what_its_class_keeps_in_float32_stays_so(tmp_path, folder):
    teacher = load_teacher(folder, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in teacher.network.named_parameters()}
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == dtypes["scale_shift_table"] == torch.float32
    assert teacher.dtype == dtypes["patch_embedding.weight"] == dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert api.train(recipe(folder, train={"updates": 1, "precision": "bf16"}), out=tmp_path / "run").is_dir()


def test_the_stock_call_tells_the_network_what_we_do(folder):
    """Types too: the time is float32, the text the network's own."""
    teacher = load_teacher(folder, dtype=torch.bfloat16)
    pipe, seen = teacher.loaded, []
    own = pipe.transformer.forward
    pipe.transformer.forward = lambda **given: (seen.append(given), own(**given))[1]
    pipe.set_progress_bar_config(disable=True)
    seed, asked = lambda: torch.Generator().manual_seed(0), {"num_inference_steps": 1, "guidance_scale": 1.0}
    pictures(pipe, teacher.family.prompts, PROMPTS, generator=seed(), **asked, **teacher.call)
    x = torch.randn(2, *teacher.latent_shape, generator=seed())
    with torch.no_grad():
        teacher.predict(pipe.transformer, x, torch.ones(2, dtype=torch.float64), teacher.encode(PROMPTS))
    stock, ours = ({name: value for name, value in given.items() if torch.is_tensor(value)} for given in seen)
    assert stock.keys() == ours.keys()
    for name, value in stock.items():
        assert value.dtype == ours[name].dtype and torch.equal(value, ours[name]), name
