"""What a guided call is given beside its scale, a negative prompt and a rescale, against stock calls of every
family."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import save_tiny, save_tiny_sd3

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from test_sdxl import save_tiny_xl

from stepdistill import api
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.prediction import linear, rescaled
from stepdistill.diffusion.sampler import Sampler
from stepdistill.errors import RequestError
from stepdistill.export import read_settings
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.sources import Source
from stepdistill.models.stock import pictures
from stepdistill.models.teacher import Teacher, load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check
from stepdistill.run.data import _identity
from stepdistill.run.targets import open_target, teachers

from . import unet2d
from .test_matrix import CASES, folder_of, recorded

__all__ = ["folder_of"]
NEGATIVE = "blue square"
# Of those that subtract no text, some guide with none.
NONE = ("flux-dev", "flux2-dev", "flux2-klein", "dit", "dit-eps", *unet2d.CASES)
SERVED = [name for name in CASES if name not in NONE]
PROMPTS = ("a red ring", "a blue square")


def drawn(teacher: Teacher, prompts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(our sampler's pictures, those of a stock call) from the same noise, both guided at 3."""
    stock, seed = teacher.pipeline(), lambda: torch.Generator().manual_seed(7)
    stock.set_progress_bar_config(disable=True)
    grid, asked = recorded(stock), {"num_inference_steps": 3, **teacher.guidance.call(3.0), **teacher.call}
    theirs = pictures(stock, teacher.family.prompts, prompts, generator=seed(), **asked)
    sampler, role = (Sampler.of(stock.scheduler, 3, teacher.schedule, **grid),
                     guided(Denoiser(teacher, teacher.network), 3.0))
    with torch.no_grad():
        ours = sampler(role, torch.randn(len(prompts), *teacher.latent_shape, generator=seed()),
                       teacher.encode(list(prompts)))
    return teacher.decode(ours) / 2 + 0.5, theirs


@pytest.mark.parametrize("name", SERVED)
def test_a_negative_prompt_is_what_the_stock_call_is_drawn_away_from(folder_of, name):
    plain, teacher = load_teacher(folder_of(name)), load_teacher(Source(str(folder_of(name)), negative_prompt=NEGATIVE))
    assert teacher.guidance.call(3.0)["negative_prompt"] == NEGATIVE
    ours, theirs = drawn(teacher, CASES[name].prompts)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (drawn(plain, CASES[name].prompts)[1] - theirs).abs().max() > 1e-3


@pytest.fixture(scope="module")
def rescaling(tmp_path_factory):
    """Folders of the pipelines whose calls take a rescale."""
    place = lambda name: tmp_path_factory.mktemp("rescaling") / name
    return {"sd": save_tiny(place("sd")), "sd-v": save_tiny(place("sd-v"), "v_prediction"),
            "sdxl": save_tiny_xl(place("sdxl"), zeros=True)}


@pytest.mark.parametrize("name, negative", [("sd", NEGATIVE), ("sd-v", None), ("sdxl", None), ("sdxl", ""),
                                            ("sdxl", NEGATIVE)])
def test_guidance_is_rescaled_as_in_the_stock_call(rescaling, name, negative):
    """An SDXL pipeline subtracts zeros where nobody gives a negative prompt, and the encoding of "" where somebody
    gives that."""
    teacher = load_teacher(Source(str(rescaling[name]), negative_prompt=negative, guidance_rescale=0.7))
    assert teacher.guidance.call(3.0)["guidance_rescale"] == 0.7
    ours, theirs = drawn(teacher, PROMPTS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plain = load_teacher(Source(str(rescaling[name]), negative_prompt=negative))
    assert (drawn(plain, PROMPTS)[1] - theirs).abs().max() > 1e-3


def test_what_is_subtracted_skips_no_layer(tmp_path):
    """Stock calls leave layers of CLIP out of a prompt alone."""
    base = save_tiny_sd3(tmp_path / "sd3", call={"max_sequence_length": 0})
    for negative in (None, NEGATIVE):
        teacher = load_teacher(Source(str(base), clip_skip=1, negative_prompt=negative))
        ours, theirs = drawn(teacher, PROMPTS)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert teacher.call["clip_skip"] == 1


def test_a_rescaled_mix_has_the_spread_of_the_conditional_output():
    given, without = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([1.0, 3.0, 7.0]).view(3, 1, 1, 1)
    whole, half, none = (rescaled(linear, share)(given, without, w) for share in (1.0, 0.5, 0.0))
    torch.testing.assert_close(whole.std((1, 2, 3)), given.std((1, 2, 3)))
    torch.testing.assert_close(half, (whole + none) / 2)
    torch.testing.assert_close(none, linear(given, without, w))
    torch.testing.assert_close(whole[0], given[0])


@pytest.mark.parametrize("name, given, said", [
    *((name, {"negative_prompt": NEGATIVE}, "negative_prompt is 'blue square', but a call of .*Pipeline takes none")
      for name in NONE if name != "flux-dev"),
    ("flux-dev", {"negative_prompt": NEGATIVE}, "its network reads its guidance scale by itself, and no "
     "negative_prompt"),
    ("sd3", {"guidance_rescale": 0.7}, "guidance_rescale is 0.7, but a call of StableDiffusion3Pipeline takes none: "
     "leave it out")])
def test_calls_without_such_an_argument_are_refused(folder_of, name, given, said):
    with pytest.raises(RequestError, match=said):
        load_teacher(Source(str(folder_of(name)), **given))


def written(base, **entries) -> dict:
    return {"method": "lcm", "teacher": str(base), "student": {"lora": {"rank": 2}}, "guidance": 3.0, "steps": 2,
            "negative_prompt": NEGATIVE,
            "data": {"images": "shapes", "count": 4, "batch": 2}, "train": {"updates": 1}, **entries}


def test_a_recipe_names_them_and_a_run_is_compared_with_that_teacher(tmp_path):
    base = save_tiny(tmp_path / "base")
    run = api.train(written(base, guidance_rescale=0.7), out=tmp_path / "run")
    assert Recipe.load(run / "recipe.yaml").resolved()["negative_prompt"] == NEGATIVE
    folder = api.export(run)
    said = read_settings(folder)
    assert (said["teacher_parts"] == {"negative_prompt": NEGATIVE, "guidance_rescale": 0.7}
            and not {"negative_prompt", "guidance_rescale"} & said["call"].keys())
    assert f'the scale 3 was trained in, away from `"{NEGATIVE}"`' in (folder / "README.md").read_text()
    for opened in (open_target(run, "run"), open_target(folder, "lora")):
        teacher = teachers([opened])[0]
        call = teacher.guidance.call(3.0)
        assert (call["negative_prompt"] == NEGATIVE and call["guidance_rescale"] == 0.7 and not {*call}
                & {*teacher.given})
        assert teacher.guidance.none == {"guidance_scale": 1.0}
        known = load_teacher(Source(str(base), negative_prompt=NEGATIVE, guidance_rescale=0.7))
        ours, theirs = drawn(known, ("a red ring",))
        stock: DiffusionPipeline = teacher.pipeline
        again = pictures(stock, known.family.prompts, ["a red ring"], generator=torch.Generator().manual_seed(7),
                         num_inference_steps=3, **call)
        assert torch.equal(theirs, again) and (ours - theirs).abs().max() < 1e-4


def test_caches_are_told_apart(tmp_path):
    base = save_tiny(tmp_path / "base")
    given = ({}, {"negative_prompt": ""}, {"negative_prompt": NEGATIVE}, {"guidance_rescale": 0.7})
    prints = [json.dumps(_identity(load_teacher(Source(str(base), **more))), sort_keys=True) for more in given]
    assert len({*prints}) == len(prints)


@pytest.mark.parametrize("changed, said", [
    ({"guidance": 1.0}, "negative_prompt is given, but guidance is 1, and a teacher without guidance does not read it"),
    ({"negative_prompt": None, "guidance_rescale": 1.5}, "guidance_rescale is 1.5; it should be at most 1"),
    ({"stages": [{"steps": 4}, {"steps": 2, "negative_prompt": "ugly"}]}, "negative_prompt is no entry of a stage: "
     "it is the whole recipe's"),
])
def test_slips_are_refused(tmp_path, changed, said):
    base = save_tiny(tmp_path / "base")
    with pytest.raises(RequestError, match=said):
        check(Recipe.load(written(base, **changed)))


def test_toy_is_drawn_away_from_no_text():
    recipe = Recipe.load("toy/lcm").resolved() | {"negative_prompt": NEGATIVE}
    with pytest.raises(RequestError, match="negative_prompt is blue square, but the teacher is Toy"):
        check(Recipe.load(recipe))
