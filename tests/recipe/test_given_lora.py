"""A student that begins with a LoRA that somebody has."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import save_tiny, save_tiny_sd3, tiny_pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from test_sources import FILE, save_lora

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.models.denoiser import Denoiser
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check
from stepdistill.run.plan import plan
from stepdistill.run.setup import setup

TIMES = torch.tensor([0.5, 0.7], dtype=torch.float64)


def save_uneven(folder: Path) -> Path:
    """Layers of several ranks and scales, a convolution among them, with the metadata that says so."""
    pipe = tiny_pipeline()
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_out.0", "conv1"], init_lora_weights=False,
                        rank_pattern={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 5, "conv1": 3},
                        alpha_pattern={"conv1": 7})
    pipe.unet.add_adapter(config)
    state, plain = get_peft_model_state_dict(pipe.unet), config.to_dict()
    pipe.save_lora_weights(folder, unet_lora_layers=state,
                           unet_lora_adapter_metadata={key: sorted(v) if isinstance(v, set) else v
                                                       for key, v in plain.items()})
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, and LoRAs for it in several formats: kohya's is one of our own exports."""
    root = tmp_path_factory.mktemp("given")
    save_tiny(root / "base")
    save_lora(root / "even")
    save_uneven(root / "uneven")
    save_lora(root / "encoder", encoder=True)
    run = api.train(written(root, None), out=root / "run")
    api.export(run, "comfyui", out=root / "kohya", dtype="float32")
    return root


def written(root: Path, path: object, **entries) -> dict:
    student = {"lora": {"rank": 3, "alpha": 6.0, "targets": ["to_k", "conv2"]}} if path is None else {"from": str(path)}
    return {"method": "lcm", "teacher": str(root / "base"), "student": student, "guidance": 2.0, "steps": 2,
            "data": {"images": "shapes", "count": 4, "batch": 2}, "train": {"updates": 2, "lr": 1e-2}, **entries}


@pytest.mark.parametrize("path, rank, alpha", [("even", 2, 2.0), (f"even/{FILE}", 2, 2.0), ("uneven", 5, 5.0),
                                               ("kohya", 3, 6.0)])
def test_the_student_is_at_first_the_stock_pipeline_with_the_lora(root, path, rank, alpha):
    run = setup(Recipe.load(written(root, root / path)), torch.device("cpu"))
    stock = StableDiffusionPipeline.from_pretrained(root / "base", safety_checker=None)
    place = root / path
    file = place if place.is_file() else next(place.glob("*.safetensors"))
    stock.load_lora_weights(file.parent, weight_name=file.name)
    x, cond = (torch.randn(2, *run.teacher.latent_shape, generator=torch.Generator().manual_seed(0)),
               run.teacher.encode(["a red ring", "a blue square"]))
    with torch.no_grad():
        theirs = Denoiser(run.teacher, stock.unet)(x, TIMES, cond).raw
        ours, base = run.roles["student"](x, TIMES, cond).raw, run.roles.base(x, TIMES, cond).raw
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - base).abs().max() > 1e-2 or path == "kohya"
    config = run.roles.lora_metadata("student")
    assert (config["r"], config["lora_alpha"]) == (rank, pytest.approx(alpha))
    assert len(run.roles.state_dict("student")) == len([name for name in load_file(file) if not name.endswith("alpha")])
    assert torch.equal(base,
                       Denoiser(run.teacher,
                                StableDiffusionPipeline.from_pretrained(root / "base",
                                                                        safety_checker=None).unet)(x, TIMES, cond).raw)


def test_on_a_base_of_16_bits_it_is_what_the_stock_loader_reads(root):
    run = setup(Recipe.load(written(root, root / "even", train={"updates": 1, "precision": "bf16"})),
                torch.device("cpu"))
    found = run.roles.state_dict("student")
    given = {name.removeprefix("unet."): value for name, value in load_file(root / "even" / FILE).items()}
    assert run.teacher.dtype == torch.bfloat16 and found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name].bfloat16().float()) for name in given)


@pytest.mark.long
def test_training_goes_on_from_there_and_one_lora_leaves(root, tmp_path):
    recipe = Recipe.load(written(root, root / "uneven", critic={"lora": {"rank": 1}}, method="dmd2",
                                 settings={"gan_weight": 0.0},
                                 data={"prompts": "shapes", "batch": 2}, train={"updates": 1, "lr": 1e-3, "ema": 0.9}))
    assert (recipe.resolved()["student"] == {"from": str(root / "uneven"), "lora": {}}
            == Recipe.load(recipe.resolved()).resolved()["student"])
    planned = plan(recipe)["roles"]
    run = api.train(recipe, out=tmp_path / "run")
    folder = api.export(run, dtype="float32")
    found, given = load_file(folder / FILE), load_file(root / "uneven" / FILE)
    assert planned["student"]["parameters"] == sum(value.numel() for value in found.values())
    down = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    # one update of at most lr a weight
    assert found.keys() == given.keys() and 0 < (found[down] - given[down]).abs().max() < 1e-2


@pytest.mark.long
def test_stages_begin_with_it_and_go_on(root, tmp_path):
    recipe = Recipe.load(written(root, root / "even", train={"updates": 1, "lr": 1e-3},
                                 stages=[{"steps": 4}, {"steps": 2}]))
    run = api.train(recipe, out=tmp_path / "run")
    found, given = load_file(api.export(run, dtype="float32") / FILE), load_file(root / "even" / FILE)
    assert found.keys() == given.keys() and all((found[name] - given[name]).abs().max() < 1e-2 for name in found
                                                if ".lora_A." in name)


def refused(root: Path, path: object, lora: dict | None = None, **entries) -> str:
    recipe = written(root, path, **entries)
    if lora is not None:
        recipe["student"] = {"from": str(path), "lora": lora}
    with pytest.raises(RequestError) as caught:
        check(Recipe.load(recipe))
    return str(caught.value)


def test_what_is_said_of_it_must_be_so(root):
    check(Recipe.load(written(root, root / "even")
                      | {"student": {"from": str(root / "even"),
                                     "lora": {"rank": 2, "alpha": 2.0, "targets": ["to_v", "to_q"]}}}))
    assert (f"student.lora.rank is 8, but the student begins with {root / 'even'}, whose rank is 2: "
            "leave it out" in refused(root, root / "even", {"rank": 8}))
    assert "student.lora.alpha is 4, but" in refused(root, root / "even", {"alpha": 4.0})
    said = refused(root, root / "even", {"targets": ["to_q"]})
    assert "student.lora.targets name 8 layers, but the student begins with" in said and "which has 16" in said


def test_what_no_student_can_begin_with(root, tmp_path):
    assert "student.from is nowhere.safetensors: there is no LoRA nowhere.safetensors" in refused(root,
                                                                                                  "nowhere.safetensors")
    assert "is for the text_encoder too, and a student is a unet alone" in refused(root, root / "encoder")
    assert "does not fit this StableDiffusion3Pipeline" in refused(root, root / "even",
                                                                   teacher=str(save_tiny_sd3(tmp_path / "sd3")))
    with pytest.raises(RequestError, match="student.from is .*even, a LoRA, but student.lora is null, which trains "
                       "all weights: leave one out"):
        Recipe.load(written(root, root / "even") | {"student": {"from": str(root / "even"), "lora": None}})
    with pytest.raises(RequestError, match="student.form is no entry of student; did you mean from"):
        Recipe.load(written(root, root / "even") | {"student": {"form": "x"}})
    with pytest.raises(RequestError, match="student.from in a stage after the first, .* only the first stage may "
                       "begin with a LoRA"):
        Recipe.load(written(root, None, stages=[{"steps": 4}, {"steps": 2, "student": {"from": str(root / "even")}}]))
    toy = Recipe.load("toy/lcm").resolved() | {"student": {"from": str(root / "even")}}
    with pytest.raises(RequestError, match="the teacher is Toy, whose students are no LoRAs of a pipeline"):
        check(Recipe.load(toy))
