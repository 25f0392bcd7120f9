"""The embedded world is what its folders say: small enough, sound, and measured under the protocol of today."""
from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from stepdistill import resources
from stepdistill.data.shapes import captions, render, scenes
from stepdistill.evaluation.features import load_features
from stepdistill.evaluation.report import read_results
from stepdistill.evaluation.sweep import Evaluation
from stepdistill.export import open_export
from stepdistill.models.sources import call_of
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe

ASSETS = Path(__file__).parents[1] / "assets"
HELD_OUT = 11
STUDENTS = {path.name: Path(json.loads((path / "stepdistill.json").read_text())["teacher"]).name
            for path in sorted((ASSETS / "students").iterdir())}


@pytest.fixture(scope="module")
def features():
    return load_features(ASSETS / "shapes-clip")


@pytest.fixture(scope="module")
def teacher() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "shapes-sd")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def all_right(features, pixels: torch.Tensor, count: int) -> float:
    attributes = scenes(torch.arange(count), HELD_OUT).attributes
    return (features.attribute_classifier(features.images(pixels)) == attributes).all(1).double().mean().item()


def test_the_world_is_small():
    world = [path for name in ("shapes-clip", "shapes-sd") for path in (ASSETS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in world) <= 15 * 2**20


def test_a_clone_is_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ASSETS.parent, capture_output=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    tracked = [ASSETS.parent / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert sum(path.stat().st_size for path in tracked if path.exists()) <= 45e6


def test_four_students_ship_and_each_has_its_recipe():
    assert set(STUDENTS) == set(resources.STUDENTS)
    for student, recipe in resources.STUDENTS.items():
        settings = json.loads((ASSETS / "students" / student / "stepdistill.json").read_text())
        chosen = Recipe.load(recipe)
        assert (settings["method"], settings["steps"], settings["teacher"]) == (chosen.method, chosen.steps,
                                                                                chosen.teacher.base)


@pytest.mark.parametrize("folder", ["shapes-sd", "shapes-sd3", *(f"students/{name}" for name in STUDENTS)])
def test_weights_are_stored_in_half_precision(folder):
    for path in (ASSETS / folder).rglob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}, path


@pytest.mark.parametrize("cls,folder,absent", [
    (StableDiffusionPipeline, "shapes-sd", ()), (DiffusionPipeline, "shapes-sd", ()),
    (StableDiffusion3Pipeline, "shapes-sd3", ("text_encoder_3", "tokenizer_3"))])
def test_the_plain_stock_call_of_a_shipped_pipeline_runs(cls, folder, absent):
    """absent: what diffusers wants to be told that a pipeline is without."""
    pipeline = cls.from_pretrained(ASSETS / folder, **dict.fromkeys(absent))
    assert {part.dtype for part in pipeline.components.values() if isinstance(part, torch.nn.Module)} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red ring left of a blue square on a plain navy background").images[0]
    assert image.size == (32, 32) and max(high - low for low, high in image.getextrema()) > 50


def test_the_plain_stock_call_of_the_shipped_clip_runs():
    model, processor = (cls.from_pretrained(ASSETS / "shapes-clip") for cls in (CLIPModel, CLIPProcessor))
    scene = scenes(torch.arange(2), HELD_OUT)
    pictures = ((render(scene) / 2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    inputs = processor(text=captions(scene), images=list(pictures), padding=True, return_tensors="pt")
    assert model(**inputs).logits_per_image.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("student", STUDENTS)
def test_the_snippet_on_a_shipped_card_runs_as_it_stands(student, tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(ASSETS)
    monkeypatch.chdir(tmp_path)
    card = (ASSETS / "students" / student / "README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), {})
    assert Image.open(tmp_path / "sample.png").size == (32, 32)


def test_the_judge_knows_real_pictures(features):
    assert all_right(features, render(scenes(torch.arange(1000), HELD_OUT)), 1000) >= 0.97


@torch.no_grad()
def test_the_autoencoder_restores_them(teacher):
    pixels = render(scenes(torch.arange(200), HELD_OUT))
    restored = teacher.vae.decode(teacher.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    assert -10 * math.log10((restored - pixels).square().mean().item() / 4) >= 30


def test_prompts_differ_where_pipelines_look(teacher):
    """A text tower that misses its end token gives every prompt the same pooled embedding, silently."""
    tokens = teacher.tokenizer(captions(scenes(torch.arange(2), HELD_OUT)), padding="max_length", return_tensors="pt")
    one, other = teacher.text_encoder(tokens.input_ids).pooler_output
    assert (one - other).abs().max() > 0.1


def test_the_teacher_draws_what_it_is_told(features, teacher):
    prompts = captions(scenes(torch.arange(40), HELD_OUT))
    pixels = teacher(prompts, num_inference_steps=25, guidance_scale=2.0, generator=torch.Generator().manual_seed(0),
                     output_type="pt")
    assert all_right(features, pixels.images * 2 - 1, 40) >= 0.9


def test_the_flow_teacher_draws_it_too(features):
    folder = ASSETS / "shapes-sd3"
    pipeline = load_teacher(folder).pipeline()
    pipeline.set_progress_bar_config(disable=True)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10 * 2**20
    prompts = captions(scenes(torch.arange(40), HELD_OUT))
    pixels = pipeline(prompts, num_inference_steps=25, guidance_scale=2.0, generator=torch.Generator().manual_seed(0),
                      output_type="pt",
                      **call_of(str(folder)))
    assert all_right(features, pixels.images * 2 - 1, 40) >= 0.9


@pytest.mark.parametrize("student", STUDENTS)
def test_the_shipped_students_draw_it_in_their_few_steps(features, student):
    """In a stock pipeline, as its stepdistill.json says."""
    pipeline, settings = open_export(ASSETS / "students" / student, ASSETS / STUDENTS[student])
    pipeline.set_progress_bar_config(disable=True)
    assert settings["num_inference_steps"] <= 4
    prompts = captions(scenes(torch.arange(100), HELD_OUT))
    torch.manual_seed(0)                                  # for schedulers that pipelines hand no generator
    pixels = pipeline(prompts, generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images
    assert all_right(features, pixels * 2 - 1, 100) >= 0.9


@pytest.mark.parametrize("folder", ["shapes-sd", "shapes-sd3", *(f"students/{name}" for name in STUDENTS)])
def test_shipped_figures_belong_to_these_assets(folder):
    """Whatever changes the features, the judge or the pictures of reference makes the shipped figures void."""
    shipped = read_results(ASSETS / folder / "results.json")
    protocol = Evaluation(shipped["protocol"]["samples"], features=[ASSETS / "shapes-clip"]).protocol
    assert protocol.id == shipped["protocol"]["id"], json.dumps(shipped["protocol"])
