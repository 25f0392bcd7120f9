"""A LoRA of anybody's: what it says, what is refused, and the folder that is written."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stepdistill
from stepdistill import api
from stepdistill.diffusion.times import LEVELS
from stepdistill.errors import RequestError
from stepdistill.evaluation.estimate import Estimate
from stepdistill.export import read_settings
from stepdistill.methods.base import Inference
from stepdistill.models.given_lora import wearing
from stepdistill.models.sources import Source
from stepdistill.run import lora_check
from stepdistill.run.few_step import TCD_NOISE, Found, Judged, way_of
from stepdistill.run.foreign_lora import Claim, ForeignLora
from stepdistill.run.lora_check import Checked
from tests.models.test_sources import save_lora
from tests.recipe.test_given_lora import save_uneven
from tests.tiny import save_tiny, save_tiny_sd3

FILE = "pytorch_lora_weights.safetensors"
STUDENTS = Path(__file__).parents[2] / "assets" / "students"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("check")
    save_tiny(root / "base")
    save_lora(root / "even")
    save_uneven(root / "uneven")
    return root


class Flat(torch.nn.Module):
    """Features of pictures: the mean of each colour."""

    def forward(self, pixels):
        return pixels.mean((2, 3))


def save_pictures(folder: Path, caption: str | None = None) -> Path:
    """24 pictures of one colour each."""
    folder.mkdir()
    for i in range(24):
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(folder / f"{i}.png")
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption)
    return folder


def bare(file: Path, to: Path, metadata: dict[str, str] | None = None) -> Path:
    """The tensors alone, with other metadata."""
    save_file(load_file(file), to, metadata)
    return to


def opened(root: Path, name: str):
    lora = ForeignLora.open(root / name)
    return lora, *lora_check.worn(lora, Source(str(root / "base")), None)


def drawn(pipe, scheduler=None, **call) -> torch.Tensor:
    if scheduler is not None:
        pipe.scheduler = scheduler
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, **call}
    return torch.from_numpy(pipe(["red ring", "blue"], generator=torch.Generator().manual_seed(0), output_type="np",
                                 **call).images)


@pytest.mark.parametrize("name", ["even", "uneven"])
def test_a_worn_lora_is_the_stock_adapter_at_that_weight(root, name):
    _, teacher, weights = opened(root, name)
    plain, wear = drawn(teacher.loaded), wearing(teacher.network, weights)
    for scale in (0.5, 4.0, 0.0):
        wear(scale)
        stock = StableDiffusionPipeline.from_pretrained(root / "base")
        stock.load_lora_weights(root / name, adapter_name="x")
        stock.set_adapters("x", scale)
        assert (drawn(teacher.loaded) - drawn(stock)).abs().max() < 1e-5
    assert torch.equal(drawn(teacher.loaded), plain)


@pytest.mark.parametrize("told, guidance", [(Inference(2, 1.0), 1.0), (Inference(4), 2.0),
                                            (Inference(4, TCD_NOISE, end=1 / LEVELS), 1.0),
                                            (Inference(1, 1.0, times=(0.4,)), 1.0)])
def test_the_folder_draws_what_was_measured(root, tmp_path, told, guidance):
    _, teacher, weights = opened(root, "uneven")
    way = way_of(teacher, told, guidance, 0.5)
    wear = wearing(teacher.network, weights)
    wear(0.5)
    own = teacher.scheduler
    measured = drawn(teacher.loaded, way.scheduler, **way.call)
    wear(0.0)
    teacher.loaded.scheduler = own
    lora_check.write_found(lora_check.student_of(teacher, weights, way, "unknown", Source(str(root / "base")),
                                                 "red ring"), tmp_path / "out", "float32")
    stock = StableDiffusionPipeline.from_pretrained(root / "base")
    call = stepdistill.load(stock, tmp_path / "out")
    assert call == dict(way.call) and type(stock.scheduler) is type(way.scheduler)
    assert (drawn(stock, **call) - measured).abs().max() < 1e-5
    assert (sorted(file.name for file in (tmp_path / "out").rglob("*") if file.is_file())
            == [FILE, "scheduler_config.json", "stepdistill.json"])
    settings = read_settings(tmp_path / "out")
    assert settings["teacher"] == str(root / "base")
    assert settings["method"] == "unknown" and settings["steps"] == told.steps and settings["trained_guidance"] is None
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        said = file.metadata()
    assert said["modelspec.description"].endswith("sample in few steps, its call found by stepdistill.")
    assert said["modelspec.usage_hint"].endswith("guidance off" if guidance == 1 else "classifier-free guidance 2")


def test_what_it_says_of_itself(root, tmp_path):
    lora, teacher, _ = opened(root, "even")
    assert lora.claim(teacher) is None and not lora.has_alpha and lora.told_scale is None
    file = root / "even" / FILE
    spelled = {"4 steps of LCMScheduler, classifier-free guidance off": ("LCMScheduler", 4, 1.0),
               "8 steps of TCDScheduler, classifier-free guidance off": ("TCDScheduler", 8, 1.0),
               "2 steps of DDIMScheduler, classifier-free guidance 3.5": ("DDIMScheduler", 2, 3.5),
               "a 4-step LoRA": ("LCMScheduler", 4, 1.0)}
    for text, (scheduler, steps, guidance) in spelled.items():
        said = ForeignLora.open(bare(file, tmp_path / "said.safetensors",
                                     {"modelspec.usage_hint": text})).claim(teacher)
        assert said.source == "metadata" and type(said.way.scheduler).__name__ == scheduler
        assert (said.way.steps, said.way.call["guidance_scale"], said.way.scale) == (steps, guidance, 1.0)
    for text in ("best at weight 0.8", "4 steps of DPMSolverSinglestepScheduler", "0 steps"):
        assert ForeignLora.open(bare(file, tmp_path / "said.safetensors",
                                     {"modelspec.usage_hint": text})).claim(teacher) is None
    kohya = {"ss_network_dim": "2", "ss_network_alpha": "4.0", "ss_training_comment": "2 steps"}
    lora = ForeignLora.open(bare(file, tmp_path / "kohya.safetensors", kohya))
    assert lora.told_scale == 2.0 and lora.claim(teacher).way.scale == 2.0
    assert ForeignLora.open(root / "uneven").has_alpha


def test_a_contract_is_read_as_it_stands():
    base = lora_check.load_teacher("assets/shapes-sd")
    claim = ForeignLora.open(STUDENTS / "shapes-lcm").claim(base)
    assert (claim.source, claim.method, claim.way.nfe, claim.way.scale) == ("contract", "lcm", 4, 1.0)
    assert (claim.way.call == {"num_inference_steps": 4, "guidance_scale": 1.0}
            and claim.way.scheduler.config.original_inference_steps == 10)
    assert lora_check.good_guidance(base) == 2.0                    # of its results.json


def test_a_base_without_results_is_at_its_best_by_its_pipelines_default(root):
    assert lora_check.good_guidance(opened(root, "even")[1]) == 7.5


def refused(root: Path, path: Path, base: Path | None = None, **more) -> str:
    with pytest.raises(RequestError) as caught:
        api.check(path, base or root / "base", **{"features": Flat(), "samples": 12, **more})
    return str(caught.value)


def test_what_is_refused(root, tmp_path):
    pickle = tmp_path / "lora.bin"
    torch.save({}, pickle)
    assert "is no .safetensors file" in refused(root, pickle)
    shutil.copy(pickle, tmp_path / "named.safetensors")
    assert "is no safetensors file but a zip archive" in refused(root, tmp_path / "named.safetensors")
    encoder = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}
    save_file(encoder, tmp_path / "encoder.safetensors")
    assert "is a LoRA of a text encoder alone" in refused(root, tmp_path / "encoder.safetensors")
    assert "is for the text_encoder too" in refused(root, save_lora(tmp_path / "both", encoder=True))
    save_file({"unet.conv_in.weight": torch.zeros(2)}, tmp_path / "none.safetensors")
    assert ("is no LoRA: none of its 1 tensors is a factor of one; the first is "
            "unet.conv_in.weight" in refused(root, tmp_path / "none.safetensors"))
    assert "does not draw Shapes" in refused(root, root / "even", features=None)
    assert "9 samples are too few" in refused(root, root / "even", samples=9)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "is not empty" in refused(root, root / "even", out=tmp_path / "full")
    assert "there is no LoRA nowhere.safetensors" in refused(root, Path("nowhere.safetensors"))
    assert "the list of prompts is empty" in refused(root, root / "even", prompts=[])
    assert "the reference nowhere is neither `shapes`" in refused(root, root / "even", reference="nowhere")
    assert "says nothing about prompts" in refused(root, root / "even", reference=save_pictures(tmp_path / "mute"))


def test_what_is_refused_by_configs_alone(root, monkeypatch):
    """Nothing with weights is loaded: a base of videos, a LoRA of another base, features that are not there."""
    monkeypatch.setattr(lora_check, "worn", None)
    assert "is no folder of a CLIPModel" in refused(root, root / "even", features="nowhere")
    said = refused(root, STUDENTS / "shapes-lcm")
    assert "does not fit this StableDiffusionPipeline" in said and "it says that it is for assets/shapes-sd" in said
    assert "is no pipeline of diffusers" in refused(root, root / "even", Path("assets/toy"))
    load = lora_check.load_teacher
    monkeypatch.setattr(lora_check, "load_teacher", lambda *given, **told: SimpleNamespace(
        family=replace(load(*given, **told).family, video=(16, 16, 5))))
    assert "makes videos, and a call is judged by features of pictures" in refused(root, root / "even")


def test_a_lora_of_another_base_is_refused_with_the_one_that_would_fit(root, tmp_path):
    other = save_tiny_sd3(tmp_path / "sd3")
    said = refused(root, root / "even", other)
    assert ("does not fit this StableDiffusion3Pipeline" in said and "Its tensors are of a UNet that reads a text "
            "of 16 numbers a token" in said)
    wide = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(2, 2048),
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": torch.zeros(32, 2)}
    save_file(wide, tmp_path / "xl.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    said = refused(root, tmp_path / "xl.safetensors")
    assert "does not fit" in said and said.endswith("Its tensors are of Stable Diffusion XL, and it says that it "
                                                    "is for sdxl_base_v1-0")
    shapes = refused(root, STUDENTS / "shapes-sd3-dmd2")
    assert "Stable Diffusion 3 or one of its kind, and it says that it is for assets/shapes-sd3" in shapes


def test_calls_are_held_against_real_pictures_where_there_are_some(tmp_path):
    assert lora_check.real_pictures(None, ships=True).name == "shapes:50000@7"
    assert lora_check.real_pictures(None, ships=False) is None
    assert lora_check.real_pictures("base", ships=True) is None
    named = lora_check.real_pictures(save_pictures(tmp_path / "mine", "a ring"), ships=False)
    assert named.count == 14                                        # ten are held out
    assert lora_check.prompts_of(named, False, None, 3)[0] == ["a ring"] * 3
    assert lora_check.prompts_of(named, False, ["a disc"], 3)[0] == ["a disc"]
    assert lora_check.words_of(named).startswith("14 real pictures, mine:14@")


@pytest.fixture
def cheap(root, monkeypatch):
    """A base with few pictures of its own in a cache that dies."""
    monkeypatch.setattr(lora_check, "REFERENCE", 16)
    monkeypatch.setattr(lora_check, "SCALES", (0.5, 1.0))
    monkeypatch.setenv("STEPDISTILL_CACHE", str(root / "cache"))


@pytest.mark.long
def test_a_lora_that_gains_nothing_is_refused(root, cheap):
    said = refused(root, root / "even", guidance=2.0)                # of random numbers, on a base of random numbers
    assert said.startswith("no few-step LoRA: at its best, ") and "at no number of them" in said


@pytest.mark.long
def test_the_command_says_what_it_found_and_writes_it(root, cheap, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lora_check, "gains", lambda second, base: [1])
    found = api.check(root / "uneven", root / "base", out=tmp_path / "out", features=Flat(), samples=11, guidance=2.0)
    again = api.check(root / "uneven", root / "base", features=Flat(), samples=11, guidance=2.0)
    assert found.believed == "measurement" and json.dumps(found.plain | {"folder": None}) == json.dumps(again.plain)
    settings = read_settings(tmp_path / "out")
    assert settings["call"] == found.plain["best"]["call"] and settings["scheduler"] == found.plain["best"]["scheduler"]
    assert found.words.startswith("call it by ") and found.words.endswith(f"wrote {tmp_path / 'out'}")
    # a solver's, guided too, and the LoRA's own
    assert sorted(one.way.nfe for one in found.alone) == [1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8]


def test_it_is_said_where_what_it_says_and_its_tensors_disagree(root):
    _, teacher, _ = opened(root, "even")
    slopes = torch.tensor([1.0, -1.0]), torch.zeros(2)
    best = Judged(way_of(teacher, Inference(4), scale=0.5), 2, "fd", Estimate(1.0, 0.5, 1.5), slopes)
    said = Judged(way_of(teacher, Inference(2, 1.0)), 2, "fd", Estimate(9.0, 8.0, 10.0), slopes)       # surely worse
    raced = Found(best, (best,), (best,), said)
    found = Checked("x", "base", Claim("metadata", said.way), raced, (), (4,), False, "", None)
    assert found.believed == "measurement" and found.way is best.way
    assert ("its metadata and its tensors disagree: the metadata says LCMScheduler(original_inference_steps=2), "
            "num_inference_steps=2" in found.words)
    assert "its alpha was lost: it counts 0.5 times" in found.words
    held = replace(found, found=replace(found.found, claimed=replace(said, figure=best.figure)))
    assert held.believed == "metadata" and held.way is said.way and "disagree" not in held.words
    assert held.plain["claimed"]["source"] == "metadata" and held.plain["alpha"] == "lost"


@pytest.mark.long
def test_a_shipped_student_is_found_by_its_tensors_alone(tmp_path):
    """Its weights count four times what they say, as where an alpha of a quarter of the rank was lost."""
    state = load_file(STUDENTS / "shapes-lcm" / FILE)
    file = tmp_path / "mystery.safetensors"
    save_file({key: value * 4 if ".lora_B." in key else value for key, value in state.items()}, file)
    found = api.check(file, "assets/shapes-sd", out=tmp_path / "out", samples=400)
    best = found.plain["best"]
    assert best["scale"] == 0.25 and best["guidance"] == 1 and best["steps"] in (4, 8) and found.gains
    assert best["scheduler"] in ("LCMScheduler", "TCDScheduler")
    settings = read_settings(tmp_path / "out")
    assert settings["call"] == best["call"] and settings["teacher"] == "assets/shapes-sd"
