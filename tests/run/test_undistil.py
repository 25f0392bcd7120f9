"""`undistil`: what is few-step and how it is called, whose samples are trained on, and the adapter that leaves with its
card."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from stepdistill import api, resources
from stepdistill.diffusion.draws import key
from stepdistill.errors import RequestError
from stepdistill.export import open_export
from stepdistill.models.stock import pictures
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run import data, undistil
from stepdistill.run.checks import check
from stepdistill.run.setup import setup
from stepdistill.run.sources import located
from stepdistill.run.turbo import Source, recognised, spread_at_once, turbo_of
from stepdistill.run.undistil import undistilling

ROOT = Path(__file__).parents[2]
BASE, TURBO = "assets/shapes-sd", "assets/students/shapes-lcm"
PROMPTS = ("a red ring left of a blue square on a plain navy background", "a green cross right of a magenta circle "
           "on a checkered gray background")
ASKED = {"prompts": "shapes", "updates": 1, "samples": 2, "rank": 2, "steps": None, "to": "diffusers",
         "overrides": {"data.batch": 2}}


def asked(turbo, **changes):
    return undistilling(turbo, **{**ASKED, **changes})


# -- what is few-step --------------------------------------------------------------------------------------------------

def test_an_export_is_its_base_with_its_lora_and_its_scheduler_under_its_own_call():
    found, recipe = asked(TURBO)
    assert found.call == {"num_inference_steps": 4, "guidance_scale": 1.0} and "made by lcm for 4 steps" in found.known
    teacher = load_teacher(located(found.source))
    pipe, call = open_export(resources.locate(TURBO), fused=True)
    theirs, ours = pipe.unet.state_dict(), teacher.network.state_dict()
    assert type(teacher.scheduler).__name__ == type(pipe.scheduler).__name__ == "LCMScheduler" and call == found.call
    assert max((ours[name].float() - weight).abs().max() for name, weight in theirs.items()) < 1e-6
    assert recipe.method == "denoise" and recipe.data.samples.call == found.call and recipe.data.caption_dropout == 0.1


def test_a_whole_pipeline_of_an_export_is_called_as_it_says(tmp_path):
    """A pipeline folder whose stepdistill.json names its method, and one that has nothing but its scheduler."""
    pipe, _ = open_export(resources.locate(TURBO), fused=True)
    pipe.save_pretrained(tmp_path / "merged")
    found = turbo_of(tmp_path / "merged")
    assert found.known == "it has an LCMScheduler" and found.call == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert turbo_of(tmp_path / "merged", 2).call["num_inference_steps"] == 2


@pytest.mark.parametrize(("lora", "low", "high"),
                         [(None, 0.0, 0.3), (TURBO, 0.7, 0.9), ("assets/students/shapes-dmd2", 0.6, 0.9)])
def test_what_a_network_says_at_pure_noise_tells_few_steps_from_many(lora, low, high):
    source = located(Source.of(BASE)) if lora is None else turbo_of(lora).source
    assert low < spread_at_once(load_teacher(source), PROMPTS) < high


def test_the_spread_is_that_of_a_network_which_says_the_mean_or_the_noise():
    """In closed form: data of one deviation; the mean has none, and a network that says c noise has c, over that of its
    samples."""
    from stepdistill.run.turbo import _spread
    x = torch.randn(16, 3, 4, 4)
    assert _spread(torch.ones(16, 3, 4, 4)) == 0
    assert (_spread(2 * x + torch.arange(16).div(8).floor()[:, None, None, None]).item()
            == pytest.approx(2 * _spread(x).item(), rel=1e-5))


def test_a_model_of_many_steps_is_refused_with_its_figure():
    with pytest.raises(RequestError, match=r"is no few-step model: at pure noise .* by 0\.2\d of .* by 0\.5 or "
                       r"more.*--steps 4"):
        asked(BASE)
    said = turbo_of(BASE, 4)
    assert recognised(said, PROMPTS) is said and said.known == "--steps says so"


@pytest.mark.parametrize(("turbo", "changes", "message"), [
    (TURBO, {"prompts": None}, "reads texts, and its samples are made of some: give --prompts"),
    (TURBO, {"to": "webui"}, "--to webui: an adapter is written for diffusers, kohya, ai-toolkit"),
    (TURBO, {"to": "ai-toolkit"}, "--to ai-toolkit: it reads adapters of FluxPipeline and ZImagePipeline, and this "
     "is a StableDiffusionPipeline"),
    ("assets/students/shapes-sd3-dmd2", {"to": "kohya"}, "kohya's LoRA keys are written for UNets"),
    (TURBO, {"steps": 4}, "is an export, whose 4 steps are recorded: leave it out"),
    ("assets/toy", {}, "is Toy, whose network carries no LoRA"),
])
def test_what_cannot_be_is_refused(turbo, changes, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        asked(turbo, **changes)


@pytest.mark.parametrize(("overrides", "entry"), [
    ({"student": "full"}, "student"), ({"method": "lcm"}, "method"), ({"teacher": BASE}, "teacher"),
    ({"data.samples.call.num_inference_steps": 2}, "data"), ({"data.samples.solver": "ddim"}, "data"),
    ({"stages": [{"steps": 20}, {"steps": 10}]}, "stages")])
def test_what_would_make_another_thing_of_it_is_refused_before_anything_is_loaded(monkeypatch, overrides, entry):
    monkeypatch.setattr(undistil, "recognised", None)
    with pytest.raises(RequestError, match=f"{entry} is changed, but an adapter is a LoRA on the few-step model"):
        asked(TURBO, overrides=overrides)


def test_a_recipe_that_cannot_work_is_refused_before_the_model_is_looked_at(monkeypatch):
    monkeypatch.setattr(undistil, "recognised", None)
    with pytest.raises(RequestError, match="--to kohya: kohya's LoRA keys"):
        asked("assets/shapes-sd3", to="kohya")
    with pytest.raises(RequestError, match="guidance is 2.0, but denoise asks no teacher"):
        asked(BASE, overrides={"guidance": 2.0})
    with pytest.raises(RequestError, match="reads texts, and its samples are made of some: give --prompts"):
        asked(TURBO, prompts="none")


def test_a_base_of_few_bits_with_a_lora_in_it_is_refused():
    with pytest.raises(RequestError, match="teacher.quantization is nf4|teacher.loras are given"):
        check(asked(TURBO, overrides={"teacher.quantization": "nf4"})[1])


# -- what is trained on, and what leaves -------------------------------------------------------------------------------

def test_it_is_trained_on_what_its_stock_pipeline_draws(tmp_path, monkeypatch):
    """Latents of the pictures of its own few-step call, each from the noise of its number, as an export's user draws
    them."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    _, recipe = asked(TURBO, samples=3)
    run = setup(recipe, torch.device("cpu"))
    found, _ = data.dataset(run)[torch.tensor([2, 0])]
    pipe, call = open_export(resources.locate(TURBO), fused=True)
    texts = data.captions(run).captions(torch.tensor([2, 0]))
    generators = [torch.Generator().manual_seed(key(0, data.SAMPLE, "start", i)) for i in (2, 0)]
    drawn = pictures(pipe, run.teacher.family.prompts, texts, generator=generators, **call)
    right = run.teacher.encode_images(drawn * 2 - 1)
    assert (found - right).abs().max() < 0.02 * right.abs().max()                       # kept in half precision


def test_caches_of_samples_without_a_call_keep_their_name():
    recipe = Recipe.load({"method": "denoise", "teacher": BASE, "student": {"lora": {"rank": 2}}, "steps": 25,
                          "train": {"updates": 1},
                          "data": {"samples": {"prompts": "shapes"}, "count": 2, "batch": 2}})
    run = setup(recipe, torch.device("cpu"))
    assert data._made_by(run) == {"solver": "dpmpp_2m", "steps": 25, "guidance": 1.0, "seed": 0}


@pytest.mark.long
def test_the_adapter_leaves_with_a_card_that_says_how_it_is_used(tmp_path, monkeypatch):
    """Its snippet saves the few-step model with the adapter in its weights."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    turbo = resources.locate(TURBO)
    out = api.undistil(turbo, prompts="shapes", updates=1, samples=2, rank=2, out=tmp_path / "run",
                       **{"data.batch": 2, "train.lr": 1e-2, "train.warmup": 0})
    assert out == tmp_path / "run/export/diffusers"
    card = (out / "README.md").read_text()
    for words in ("is sampled with it off", "`num_inference_steps=4`, `guidance_scale=1.0`",
                  f'- "{out.as_posix()}/pytorch_lora_weights.safetensors"'):
        assert words in card
    code, = re.findall("```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(ROOT)                              # where what ships is found by its name
    exec(code.replace("to-train-on", str(tmp_path / "fused")), {})
    base = StableDiffusionPipeline.from_pretrained(resources.locate(BASE)).unet.float().state_dict()
    fused = StableDiffusionPipeline.from_pretrained(tmp_path / "fused").unet.float().state_dict()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    added = sum(state[f"unet.{name}.lora_B.weight"].float() @ state[f"unet.{name}.lora_A.weight"].float()
                for state in (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (Path(turbo), out)))
    assert (fused[f"{name}.weight"] - base[f"{name}.weight"] - added).abs().max() < 1e-5 < added.abs().max()
