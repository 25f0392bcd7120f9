"""What cannot work is refused before any weights are read: data, sizes, LoRAs, options of a teacher's help."""
from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from stepdistill import api
from stepdistill.cli import answer, app, spelled
from stepdistill.errors import RequestError
from stepdistill.models.rewards import load_reward
from stepdistill.run.with_teacher import Asked

STUDENT = "assets/students/shapes-dmd2"
ENTRIES = {"method": "lcm", "teacher": "assets/shapes-sd", "student": {"lora": {"rank": 2}}, "guidance": 2.0,
           "steps": 2, "train": {"updates": 1}, "evaluate": {"nfe": [1]}}


def loaded(*given, **told):
    raise AssertionError("something was loaded")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without pictures, one and a tar of a picture without a caption, and a text without a line."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    for name in ("setup", "open_target"):
        monkeypatch.setattr(api, name, loaded)
    (tmp_path / "none").mkdir()
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "bare/0.png")
    with tarfile.open(tmp_path / "bare.tar", "w") as shard:
        shard.add(tmp_path / "bare/0.png", "0.png")
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    (tmp_path / "none.txt").write_text("\n")
    return tmp_path


DATA = {
    "none' holds no image. Put png": {"images": "{}/none"},
    "bare/0.png' has no caption. Write it into": {"images": "{}/bare"},
    "bare.tar/0.png' has no caption: a sample of a shard is a picture and": {"images": "{}/bare.tar"},
    "none.tar' holds no picture: shards hold png": {"images": "{}/none.tar"},
    "'{}/other' is not a folder": {"images": "{}/other"},
    "none.txt' has no prompt in it. Write one prompt a line": {"samples": {"prompts": "{}/none.txt"}, "count": 2},
    "data.samples.prompts is none, but the teacher reads texts: name some": {"samples": {"prompts": "none"},
                                                                             "count": 2},
}


@pytest.mark.parametrize("words", DATA)
def test_data_that_cannot_be_read_are_refused_before_the_teacher_is_loaded(world, words):
    put = lambda value: ({key: put(one) for key, one in value.items()} if isinstance(value, dict)
                         else value.replace("{}", str(world)) if isinstance(value, str) else value)
    with pytest.raises(RequestError, match=re.escape(put(words))):
        api.train({**ENTRIES, "data": {**put(DATA[words]), "batch": 2}}, out=world / "run")
    assert not (world / "run").exists()


@pytest.mark.parametrize("size", [30, [32, 30]])
def test_a_size_that_a_teacher_does_not_draw_is_refused_at_its_entry(world, size):
    with pytest.raises(RequestError, match=r"resolution is .*, which the teacher does not draw: .* of a multiple of "
                       r"\d+ pixels; found 30"):
        api.train({**ENTRIES, "resolution": size, "data": {"images": "shapes", "batch": 2}}, out=world / "run")


def test_negatives_of_a_student_that_its_pipeline_guides_are_refused_at_their_entry(world):
    with pytest.raises(RequestError, match="recipe: negatives are given, but a student of snapfusion is guided by its "
                       "pipeline already: leave them out"):
        api.train({**ENTRIES, "method": "snapfusion", "negatives": {"prompts": ["ugly"]},
                   "data": {"images": "shapes", "batch": 2}}, out=world / "run")


# -- sample and bench --------------------------------------------------------------------------------------------------

HELP = {
    "guidance scale is at least 1, which is none; found 0.5": "diversity,guidance=0.5",
    "teacher_steps of diversity is a whole number, such as 1; found 1.5": "diversity,teacher_steps=1.5",
    "teacher_steps of adaptive is from 1 to 1000; found teacher_steps = 1e+07": "adaptive,teacher_steps=1e7",
    "weight of distillation_pp is from 0 to 1; found weight = 2": "distillation_pp,weight=2",
    "strength of adaptive is from 0.001 to 1; found strength = 0": "adaptive,strength=0",
    "handover of diversity is from 0 to 1000; found handover = -1": "diversity,handover=-1",
    "guidance is given twice: say it once": "diversity,guidance=2,guidance=3",
    "there is no pipeline at 'nowhere'": "diversity,teacher=nowhere",
}


@pytest.mark.parametrize("words", HELP)
def test_a_help_that_is_none_for_any_student_is_refused(world, words):
    with pytest.raises(RequestError, match=re.escape(words)):
        Asked.of(HELP[words])
    with pytest.raises(RequestError, match=re.escape(words)):
        api.sample(STUDENT, "a ring", with_teacher=HELP[words])


def test_a_sheet_and_a_picture_are_two_files(world):
    with pytest.raises(RequestError, match="same.png is to be the sheet of x_0 and the picture: name two files"):
        api.sample(STUDENT, "a ring", with_teacher="diversity", out=world / "same.png", x0=f"{world}/./same.png")


def test_strengths_without_a_lora_and_evaluations_of_one_that_is_worn_are_refused(world, monkeypatch):
    monkeypatch.setattr(api.benching, "open_target", loaded)
    monkeypatch.setattr(api.composing, "open_target", loaded)
    with pytest.raises(RequestError, match="--scales 0.5: are the strengths of LoRAs"):
        api.bench(STUDENT, scales=[0.5])
    with pytest.raises(RequestError, match="a student in its own steps, .*: leave --nfe out"):
        api.bench(STUDENT, compose=[world], nfe=[1])


def test_a_composition_that_cannot_be_is_refused(world, monkeypatch):
    monkeypatch.setattr(api.composing, "open_target", loaded)
    lora = f"{STUDENT}/pytorch_lora_weights.safetensors"
    for told, words in (({"compose": ["nowhere"]}, "there is no LoRA nowhere"),
                        ({"compose": [lora], "scales": [0.0]}, "different numbers above 0, .*; found 0"),
                        ({"compose": [lora, lora]}, "told apart by their names"),
                        ({"compose": [lora], "samples": 2}, "at least 3 samples, .*; found 2 of 8 prompts"),
                        ({"compose": [lora], "features": ["a", "b"]}, "one kind of features; found 2: name one")):
        with pytest.raises(RequestError, match=words):
            api.bench(STUDENT, **told)


def test_a_place_of_weights_that_is_left_empty_is_not_another():
    with pytest.raises(RequestError, match="pickscore= names no place: say pickscore=FOLDER"):
        load_reward("pickscore=", {}, lambda prompt: None)


# -- the commands ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "words"), [
    (("bench", STUDENT, "--prompts", "assets/toy"), "is Toy, whose classes are drawn without end: give a .txt file"),
    (("check", STUDENT, "--base", "assets/shapes-sd", "--prompts", "assets/toy"), "drawn without end"),
    (("undistil", STUDENT, "--set", "steps=8"), "--set steps: undistil says that by an option of its own"),
    (("undistil", STUDENT, "--set", "turbo=x"), "--set turbo: undistil says that by"),
])
def test_commands_refuse_in_one_paragraph(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        answer(lambda: app(args=spelled([*arguments])))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and "Traceback" not in said and "\n\n" not in said.strip()
