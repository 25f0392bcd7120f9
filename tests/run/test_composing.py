"""Which targets are benched under other LoRAs, and what is refused before any of them is loaded."""
from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import ASSETS, save_tiny, style, tiny_pipeline

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.evaluation.compose import SAMPLES, SCALES
from stepdistill.export import load, open_export
from stepdistill.models.families import stock_prompts
from stepdistill.models.fused import ADAPTER, load_lora
from stepdistill.models.stock import pictures
from stepdistill.run import composing

STUDENT = "assets/students/shapes-lcm"


@pytest.fixture
def asked(monkeypatch):
    found = []
    monkeypatch.setattr(composing, "bench_composed", lambda *given, **told: found.append((given, told)))
    return found


def test_a_shipped_student_is_looked_at_in_the_features_and_captions_of_shapes(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(composing, "check_composed", lambda *given: None)            # who asks the Hub for its file
    api.bench(STUDENT, compose=["somewhere/else"], out=tmp_path)
    (student, base, styles, out), told = asked[0]
    assert (student.name, base.name, [style.path for style in styles], out) == ("shapes-lcm", "teacher",
                                                                                ["somewhere/else"], tmp_path)
    assert (told["trained"], told["scales"], told["samples"], told["guidance"]) == (2.5, SCALES, SAMPLES, None)
    assert (len(told["prompts"]) == 8 and "background" in told["prompts"][0]
            and [path.name for path in told["features"]] == ["shapes-clip"])


@pytest.mark.parametrize("more, says", [
    ({"reference": "shapes"}, "leave --reference out"), ({"few_step": ["x"]}, "leave --few-step out"),
    ({"reuse": ["x"]}, "leave --reuse out")])
def test_options_of_other_benches_are_refused(more, says):
    with pytest.raises(RequestError, match=says):
        api.bench(STUDENT, compose=["x"], **more)


def test_what_has_no_lora_is_refused_before_it_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(composing, "open_target", None)
    with pytest.raises(RequestError, match="is of one student at a time; found 2 targets"):
        api.bench(STUDENT, STUDENT, compose=["x"])
    with pytest.raises(RequestError, match="is no student, and a bench under other LoRAs asks whether a distilled "
                       "LoRA goes with them"):
        api.bench(save_tiny(tmp_path / "pipe"), compose=["x"])
    whole = tmp_path / "whole"
    whole.mkdir()
    settings = json.loads((ASSETS / "students/shapes-lcm/stepdistill.json").read_text())
    (whole / "stepdistill.json").write_text(json.dumps(settings | {"format": "pipeline", "weights": "unet"}))
    with pytest.raises(RequestError, match="whole is a whole pipeline, and a bench under other LoRAs"):
        api.bench(whole, compose=["x"])
    monkeypatch.setattr(composing.folder, "is_run", lambda place: True)
    recipe = SimpleNamespace(student=SimpleNamespace(lora=None), trains_solver=False)
    monkeypatch.setattr(composing.folder, "recipe_of", lambda place: recipe)
    monkeypatch.setattr(composing, "quantization", lambda recipe: "nf4")
    with pytest.raises(RequestError, match="is a run that trained all its weights"):
        api.bench(tmp_path, compose=["x"])
    recipe.student.lora = "one"
    with pytest.raises(RequestError, match=r"is quantised \(nf4\): LoRAs lie beside its weights there"):
        api.bench(tmp_path, compose=["x"])


def test_videos_are_refused(monkeypatch):
    frames = SimpleNamespace(target=SimpleNamespace(name="film", pipeline=None))
    monkeypatch.setattr(composing, "open_target", lambda *given, **told: frames)
    monkeypatch.setattr(composing, "stock_prompts", lambda pipeline: SimpleNamespace(gives="frames"))
    with pytest.raises(RequestError, match="film makes videos, and a style is looked at in pictures"):
        api.bench(STUDENT, compose=[f"{STUDENT}/pytorch_lora_weights.safetensors"])


def test_a_style_on_a_student_is_both_adapters_of_a_stock_pipeline(tmp_path):
    """A bench adds the student's LoRA to the weights first: the pictures are those of `load` and a style beside it."""
    base = StableDiffusionPipeline.from_pretrained(ASSETS / "shapes-sd")
    lora = style(base, tmp_path / "ink", 0.5)
    call = load(base, STUDENT)
    base.load_lora_weights(lora.path, adapter_name="ink")
    base.set_adapters(["student", "ink"], adapter_weights=[1.0, 0.75])
    fused, same = open_export(STUDENT)
    assert same == call
    load_lora(fused, lora)
    fused.set_adapters([ADAPTER], adapter_weights=[0.75])
    prompt = ["a red ring left of a blue square on a plain navy background"]
    both, ours = (pictures(pipe, stock_prompts(pipe), prompt, generator=[torch.Generator().manual_seed(0)], **call)
                  for pipe in (base, fused))
    torch.testing.assert_close(ours, both, rtol=0, atol=1e-4)
    fused.set_adapters([ADAPTER], adapter_weights=[0.0])
    without = pictures(fused, stock_prompts(fused), prompt, generator=[torch.Generator().manual_seed(0)], **call)
    assert (without - both).square().mean().sqrt() > 0.01


@pytest.mark.long
def test_a_run_is_looked_at_as_its_export_is(tmp_path):
    entries = {"method": "lcm", "teacher": str(save_tiny(tmp_path / "teacher")), "student": {"lora": {"rank": 2}},
               "steps": 2, "guidance": 2.0,
               "data": {"images": "shapes", "count": 8, "batch": 4}, "train": {"updates": 20, "lr": 0.01},
               "resolution": 16}
    run = api.train(entries, out=tmp_path / "run")
    exported = api.export(run, to="lora", dtype="float32")
    lora = style(tiny_pipeline(), tmp_path / "ink", 3.0)
    found = [api.bench(target, compose=[lora.path], scales=[1.0], samples=4, prompts=["a red ring", "a blue cross"],
                       out=tmp_path / f"out-{i}")
             for i, target in enumerate((run, exported))]
    ours, theirs = ([row["metrics"] for row in results["rows"]] for results in found)
    assert [row["target"] for row in found[0]["rows"]] == ["teacher:dpmpp_2m", "run", "teacher:dpmpp_2m + ink at 1",
                                                           "run + ink at 1"]
    for one, other in zip(ours, theirs, strict=True):
        assert one == {name: value if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)
                       for name, value in other.items()}
    assert found[0]["compose"][0]["scales"][0]["kept"] == pytest.approx(found[1]["compose"][0]["scales"][0]["kept"],
                                                                        rel=1e-2)
