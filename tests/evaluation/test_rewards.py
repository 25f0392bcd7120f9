"""Rewards: the published formulas on transformers' own outputs, the processor's own pixels, gradients, and what is
refused."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image
from tiny import ASSETS, tiny_pipeline
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, Dinov2Config

import stepdistill
from stepdistill.data.shapes import captions, render, scenes
from stepdistill.errors import RequestError
from stepdistill.evaluation.estimate import mean_of
from stepdistill.evaluation.own import bench_own
from stepdistill.evaluation.plans import Target, plans
from stepdistill.models import rewards
from stepdistill.models.reading import Reading, resized
from stepdistill.run.sources import marked, reward_of

MEAN, DEVIATION = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
PROMPTS = ["a red ring", "a very blue square on a plain ground", ""]


@pytest.fixture(scope="module")
def folder(clip_folder, tmp_path_factory):
    """A CLIPModel with a logit_scale of its own, and its processor."""
    place = tmp_path_factory.mktemp("rewards") / "pick"
    shutil.copytree(clip_folder, place)
    model = CLIPModel.from_pretrained(place)
    model.logit_scale.data.fill_(1.75)
    model.save_pretrained(place)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=MEAN,
                          image_std=DEVIATION).save_pretrained(place)
    return place


def eight_bits(*shape: int, least: int = 0) -> torch.Tensor:
    """Pixels in [-1, 1] that 8 bits hold, of noise from the level `least` to 255 - least."""
    return torch.randint(least, 256 - least, shape, generator=torch.Generator().manual_seed(0)) / 127.5 - 1


def processed(folder, pixels):
    """What the processor of the model makes of them."""
    pictures = [Image.fromarray(((one + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()) for one in pixels]
    return CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values


def test_scores_are_the_published_formulas_of_transformers_own_outputs(folder):
    pixels = eight_bits(3, 3, 32, 32)
    model, tokenizer = (CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(),
                        CLIPTokenizer.from_pretrained(folder))
    with torch.no_grad():
        found = model(**tokenizer(PROMPTS, padding=True, return_tensors="pt"), pixel_values=processed(folder, pixels))
    cosines = (found.image_embeds * found.text_embeds).sum(1)                    # transformers has normalised them
    pick, hps = reward_of(f"pickscore={folder}"), reward_of(f"hpsv2={folder}")
    torch.testing.assert_close(pick(pixels, PROMPTS), found.logits_per_image.diagonal(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pick(pixels, PROMPTS), torch.e ** 1.75 * cosines, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hps(pixels, PROMPTS), cosines, rtol=1e-4, atol=1e-6)
    assert pick(pixels, PROMPTS).dtype == torch.float32 and pick.id == hps.id and cosines.std() > 1e-3


@pytest.mark.parametrize("height, width", [(32, 32), (64, 48), (40, 71), (20, 33)])
def test_pixels_are_read_as_the_processor_reads_them(folder, height, width):
    # far from the ends, where the processor clips after each axis
    pixels = eight_bits(2, 3, height, width, least=64)
    read, expected = Reading(folder, 32, "cpu")(pixels), processed(folder, pixels)
    levels = (read - expected).abs() * torch.tensor(DEVIATION)[:, None, None] * 255
    # the processor rounds to 8 bits, after each axis
    assert levels.max() < (1e-3 if height == width == 32 else 1.51)
    shape = tuple(32 * side // min(height, width) for side in (width, height))   # the same filter without rounding
    whole = [[np.asarray(Image.fromarray(channel.numpy(), "F").resize(shape, Image.Resampling.BICUBIC))
              for channel in one] for one in pixels]
    left, top = (side - 32) // 2 if (side := shape[0]) else 0, (shape[1] - 32) // 2
    exact = torch.from_numpy(np.array(whole)).clamp(-1, 1)[..., top:top + 32, left:left + 32]
    torch.testing.assert_close(resized(pixels, 32), exact, rtol=0, atol=1e-3)


def test_gradients_reach_the_pixels(folder):
    reward = reward_of(f"pickscore={folder}")
    pixels = (eight_bits(2, 3, 48, 40) * 0.9).requires_grad_()
    score = reward(pixels, PROMPTS[:2])
    slope, = torch.autograd.grad(score.sum(), pixels)
    assert slope.isfinite().all() and (slope.flatten(1).norm(dim=1) > 1e-4).all()
    along = slope / slope.norm()
    # the directional derivative, by differences
    for sign in (1, -1):
        moved = reward(pixels + sign * 0.05 * along, PROMPTS[:2]).sum() - score.sum()
        assert moved.item() == pytest.approx(sign * 0.05 * slope.norm().item(), rel=0.15)
    assert not any(parameter.requires_grad for parameter in reward.parameters()) and not reward.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(reward(pixels, PROMPTS[:2]), score)


def test_a_score_depends_on_its_own_picture_and_prompt_alone(folder):
    reward, pixels, order = reward_of(f"pickscore={folder}"), eight_bits(3, 3, 32, 32), [2, 0, 1]
    whole = reward(pixels, PROMPTS)
    torch.testing.assert_close(reward(pixels[order], [PROMPTS[i] for i in order]), whole[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([reward(pixels[i:i + 1], PROMPTS[i:i + 1]) for i in range(3)]), whole,
                               rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"pixels \(B, 3, H, W\) and B prompts; found \(3, 3, 32, 32\) and 2"):
        reward(pixels, PROMPTS[:2])


def test_shapes_are_judged_by_the_attributes_that_are_asked_for():
    scene = scenes(torch.arange(24), 9)
    pixels, asked, reward = render(scene), captions(scene), reward_of("shapes_reward")
    own, others = reward(pixels, asked), reward(pixels, asked[1:] + asked[:1])
    assert (own <= 0).all() and own.mean() > -0.05 and others.mean() < -1
    features = CLIPModel.from_pretrained(ASSETS / "shapes-clip",
                                         dtype=torch.float32).get_image_features(pixel_values=pixels).pooler_output
    heads = [features @ weight.T + bias for weight, bias in reward.judge.heads]
    by_hand = torch.stack([logits.log_softmax(1)[torch.arange(24), scene.attributes[:, i]]
                           for i, logits in enumerate(heads)]).mean(0)
    torch.testing.assert_close(own, by_hand, rtol=1e-4, atol=1e-5)
    blurred = torch.nn.functional.avg_pool2d(pixels, 3, 1, 1).requires_grad_()
    before = reward(blurred, asked).mean()
    slope, = torch.autograd.grad(before, blurred)
    assert reward(blurred + 0.5 * slope / slope.norm(), asked).mean() > before
    with pytest.raises(RequestError, match="shapes_reward scores captions of Shapes, such as .*; found 'a red ring'"):
        reward(pixels[:1], ["a red ring"])


def test_a_bench_has_the_score_with_its_interval_and_names_the_licence(folder, tmp_path):
    pipeline = tiny_pipeline(seed=1)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=4)
    student, teacher = (Target("student", pipeline, "lcm", {"guidance_scale": 1.0, "num_inference_steps": 1}),
                        Target("teacher", tiny_pipeline()))
    marks = marked([f"hpsv2={folder}"], None)
    reward = reward_of(f"hpsv2={folder}")
    assert marks == {"hpsv2": f"sha256 {reward.id}, licence of the weights: Apache-2.0"}
    results = bench_own([student, teacher], teacher, [1], tmp_path, guidance=[1.0], solvers=["ddim"],
                        prompts=PROMPTS[:2], samples=6,
                        say=lambda text: None, metrics=marks)
    row = next(row for row in results["rows"] if row["target"] == "student")["metrics"]
    pixels = plans(student, [1], [], [], print)[0].images(PROMPTS[:2] * 3, torch.arange(6), 0)
    expected = mean_of(reward(pixels, PROMPTS[:2] * 3))
    assert ((row["hpsv2"], row["hpsv2_low"], row["hpsv2_high"])
            == pytest.approx((expected.value, expected.low, expected.high), rel=1e-3))
    assert row["hpsv2_low"] < row["hpsv2"] < row["hpsv2_high"]
    page = (tmp_path / "report.html").read_text()
    assert ">hpsv2</button>" in page and "licence of the weights: Apache-2.0" in page


def test_weights_that_cannot_be_had_are_refused_with_what_to_do(folder, tmp_path, monkeypatch):
    def offline(*given):
        raise OSError("no connection")
    monkeypatch.setattr(rewards, "cached_file", offline)
    for asked, says in (("pickscore", "from yuvalkirstain/PickScore_v1: no connection. Download them where there "
                                      "is a network, and name their folder: pickscore=FOLDER with config.json, "
                                      "model.safetensors, preprocessor_config.json, tokenizer.json"),
                        ("pickscore=no/such/folder", "from no/such/folder: there is no such folder. Download"),
                        ("hpsv2", r"hpsv2 cannot be loaded: its weights \(xswu/HPSv2\) are published as a pickle, "
                         r"which is never read: name the folder"),
                        ("imagereward", "imagereward cannot be loaded: .*no class.*: use pickscore or hpsv2, or "
                         "a metric of a plugin"),
                        (f"imagereward={folder}", "imagereward cannot be loaded"),
                        ("aesthetic", "there is no reward aesthetic: known are pickscore, hpsv2")):
        with pytest.raises(RequestError, match=says):
            reward_of(asked)
    with pytest.raises(RequestError, match="the metric hpsv3 is no metric; did you mean hpsv2?"):
        marked(["hpsv3"], None)


def test_folders_of_others_are_refused(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "preprocessor_config.json").write_text("{}")
    with pytest.raises(RequestError, match="cannot be read as pickscore: it has no image_mean and image_std"):
        reward_of(f"pickscore={broken}")
    (broken / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match="does not hold pickscore: it lacks preprocessor_config.json. A CLIPModel "
                       "saved by save_pretrained"):
        reward_of(f"pickscore={broken}")
    shutil.copy(folder / "preprocessor_config.json", broken)
    Dinov2Config().save_pretrained(broken)
    with pytest.raises(RequestError, match="cannot be read as hpsv2: it is a dinov2, and a CLIPModel"):
        reward_of(f"hpsv2={broken}")
    shutil.copy(folder / "config.json", broken)
    (broken / "model.safetensors").write_bytes(b"\x80\x04" + b"0" * 64)
    with pytest.raises(RequestError, match="is no safetensors file but a pickle"):
        reward_of(f"hpsv2={broken}")
    said = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    (broken / "config.json").write_text(json.dumps(said))
    shutil.copy(folder / "model.safetensors", broken)
    with pytest.raises(RequestError, match="names code"):
        reward_of(f"hpsv2={broken}")


def test_a_name_of_a_reward_is_no_plugins():
    with pytest.raises(RequestError, match="a metric is named by small letters.*pickscore"):
        stepdistill.register_metric("pickscore", len)
