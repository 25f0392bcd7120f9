"""The embedded world is what its folders say: small enough, sound, and measured under the protocol of today."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stepdistill.data.shapes import captions, render, scenes
from stepdistill.evaluation.features import load_features
from stepdistill.evaluation.report import read_results
from stepdistill.evaluation.sweep import Evaluation
from stepdistill.export import open_export
from stepdistill.models.teacher import call_of, load_teacher

ASSETS = Path(__file__).parents[1] / "assets"
HELD_OUT = 11
STUDENTS = {path.name: Path(json.loads((path / "stepdistill.json").read_text())["teacher"]).name
            for path in sorted((ASSETS / "students").iterdir())}


@pytest.fixture(scope="module")
def features():
    return load_features(ASSETS / "shapes-clip")


@pytest.fixture(scope="module")
def teacher() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "shapes-sd", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def all_right(features, pixels: torch.Tensor, count: int) -> float:
    attributes = scenes(torch.arange(count), HELD_OUT).attributes
    return (features.judge(features.images(pixels)) == attributes).all(1).double().mean().item()


def test_the_world_is_small():
    world = [path for name in ("shapes-clip", "shapes-sd") for path in (ASSETS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in world) <= 15 * 2**20


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
    pixels = teacher(prompts, num_inference_steps=25, guidance_scale=2.0, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert all_right(features, pixels.images * 2 - 1, 40) >= 0.9


def test_the_flow_teacher_draws_it_too(features):
    folder = ASSETS / "shapes-sd3"
    pipeline = load_teacher(folder).pipeline()
    pipeline.set_progress_bar_config(disable=True)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10 * 2**20
    prompts = captions(scenes(torch.arange(40), HELD_OUT))
    pixels = pipeline(prompts, num_inference_steps=25, guidance_scale=2.0, generator=torch.Generator().manual_seed(0), output_type="pt",
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
    protocol = Evaluation(shipped["protocol"]["samples"], features=ASSETS / "shapes-clip").protocol
    assert protocol.id == shipped["protocol"]["id"], json.dumps(shipped["protocol"])
