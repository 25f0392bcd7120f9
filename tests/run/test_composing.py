"""Which targets are benched under other LoRAs, and what is refused before any of them is loaded."""
from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tiny import ASSETS, save_tiny

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.evaluation.compose import SAMPLES, SCALES
from stepdistill.run import composing

STUDENT = "assets/students/shapes-lcm"


@pytest.fixture
def asked(monkeypatch):
    found = []
    monkeypatch.setattr(composing, "bench_composed", lambda *given, **told: found.append((given, told)))
    return found


def test_a_shipped_student_is_looked_at_in_the_features_and_captions_of_shapes(asked, tmp_path):
    api.bench(STUDENT, compose=["somewhere/else"], out=tmp_path)
    (student, base, styles, out), told = asked[0]
    assert (student.name, base.name, [style.path for style in styles], out) == ("shapes-lcm", "teacher", ["somewhere/else"], tmp_path)
    assert (told["trained"], told["scales"], told["samples"], told["guidance"]) == (2.5, SCALES, SAMPLES, None)
    assert len(told["prompts"]) == 8 and "background" in told["prompts"][0] and [path.name for path in told["features"]] == ["shapes-clip"]


@pytest.mark.parametrize("more, says", [
    ({"reference": "shapes"}, "leave --reference out"), ({"few_step": ["x"]}, "leave --few-step out"), ({"reuse": ["x"]}, "leave --reuse out")])
def test_options_of_other_benches_are_refused(more, says):
    with pytest.raises(RequestError, match=says):
        api.bench(STUDENT, compose=["x"], **more)


def test_what_has_no_lora_is_refused_before_it_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(composing, "open_target", None)
    with pytest.raises(RequestError, match="is of one student at a time; found 2 targets"):
        api.bench(STUDENT, STUDENT, compose=["x"])
    with pytest.raises(RequestError, match="is no student, and a bench under other LoRAs asks whether a distilled LoRA goes with them"):
        api.bench(save_tiny(tmp_path / "pipe"), compose=["x"])
    whole = tmp_path / "whole"
    whole.mkdir()
    settings = json.loads((ASSETS / "students/shapes-lcm/stepdistill.json").read_text())
    (whole / "stepdistill.json").write_text(json.dumps(settings | {"format": "pipeline", "weights": "unet"}))
    with pytest.raises(RequestError, match="whole is a whole pipeline, and a bench under other LoRAs"):
        api.bench(whole, compose=["x"])
    monkeypatch.setattr(composing.folder, "is_run", lambda place: True)
    monkeypatch.setattr(composing.folder, "recipe_of", lambda place: SimpleNamespace(student=SimpleNamespace(lora=None)))
    with pytest.raises(RequestError, match="is a run that trained all its weights"):
        api.bench(tmp_path, compose=["x"])


def test_videos_are_refused(monkeypatch):
    frames = SimpleNamespace(target=SimpleNamespace(name="film", pipeline=None))
    monkeypatch.setattr(composing, "open_target", lambda *given, **told: frames)
    monkeypatch.setattr(composing, "stock_prompts", lambda pipeline: SimpleNamespace(gives="frames"))
    with pytest.raises(RequestError, match="film makes videos, and a style is looked at in pictures"):
        api.bench(STUDENT, compose=["x"])
