"""An export that is damaged, changed or cut short is named and never sampled as if it were the student."""
from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepdistill.errors import RequestError, unmarked
from stepdistill.export import export_student, open_export, read_settings
from stepdistill.export.card import code
from stepdistill.export.write import aside
from stepdistill.files.whole import aside_of, checksum

LORA, SETTINGS, SCHEDULER = "pytorch_lora_weights.safetensors", "stepdistill.json", "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def exported(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "lora"
    export_student(make(), "lora", folder)
    return folder


def emptied(folder):
    save_file({}, folder / LORA)


def changed(folder):
    tensors = load_file(folder / LORA)
    save_file(tensors | {name: torch.zeros_like(value) for name, value in tensors.items() if "lora_B" in name},
              folder / LORA)


def said(folder, **entries):
    path = folder / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(("damage", "message"), [
    (emptied, f"not those that were exported and proved: {LORA} is another file. Export again"),
    (changed, f"not those that were exported and proved: {LORA} is another file. Export again"),
    (lambda folder: (folder / LORA).unlink(), f"not those that were exported and proved: {LORA} is missing"),
    (lambda folder: said(folder, sha256={}), f"{SETTINGS} is damaged: it has no sha256"),
    (lambda folder: (emptied(folder), said(folder, schema=1)), "holds no weights. Export again"),
    (lambda folder: said(folder, call=None), f"{SETTINGS} is damaged: call is None, and should be a table. "
     "Export again"),
    (lambda folder: said(folder, steps="four"), f"{SETTINGS} is damaged: steps is 'four', and should be a "
     "whole number"),
    (lambda folder: said(folder, format="zip"), "format is 'zip', and should be 'lora' or 'pipeline' or 'comfyui'"),
    (lambda folder: said(folder, pipeline="NoPipeline"), "NoPipeline, which diffusers"),
    (lambda folder: (folder / SETTINGS).write_text("{"), f"{SETTINGS} is damaged"),
    (lambda folder: (folder / SCHEDULER).unlink(), "scheduler_config.json is damaged: No such file"),
    (lambda folder: (folder / SCHEDULER).write_text("{}"), "scheduler_config.json is damaged: what it holds has "
     "no _class_name"),
    (lambda folder: (folder / SCHEDULER).write_text('{"_class_name": "LCMScheduler", "num_train_timesteps": "many"}'),
     "no LCMScheduler can be made of it"),
    (lambda folder: (folder / SCHEDULER).write_text('{"_class_name": "Trainer"}'), "Trainer, which diffusers"),
])
def test_damage_is_named(exported, tmp_path, damage, message):
    folder = shutil.copytree(exported, tmp_path / "lora")
    damage(folder)
    with pytest.raises(RequestError, match=message):
        open_export(folder)


def test_the_weights_are_written_down(exported):
    settings = read_settings(exported)
    assert settings["schema"] == 2 and settings["sha256"] == {LORA: checksum(exported / LORA)}


def test_what_killed_exports_left_is_cleared_and_what_they_replaced_put_back(tmp_path):
    out = tmp_path / "lora"
    work = aside_of(out)
    (work / "new").mkdir(parents=True)
    (work / "old").mkdir()
    (work / "old/file").write_text("the export before")
    (work / "new/half").write_text("")
    with pytest.raises(RequestError), aside(out) as folder:
        assert (out / "file").read_text() == "the export before" and not list(folder.iterdir())
        raise RequestError("refuted")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"] and (out / "file").exists()
    with aside(out) as folder:
        (folder / "file").write_text("the new one")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"] and (out / "file").read_text() == "the new one"
    with aside(out), pytest.raises(RequestError, match="lora is in use by process"), aside(out):
        pass


def test_names_are_no_markup_in_a_card():
    assert unmarked("teacher:dpmpp_2m") == "teacher:dpmpp_2m"
    assert unmarked("<b>|`x`\n# [a](b) __c__\x1b[31m") == r"\<b\>\|\`x\` \# \[a\](b) \_\_c\_\_\\x1b\[31m"
    assert code("a/b") == "`a/b`" and code("a`b``c") == "```a`b``c```" and code("`x") == "`` `x ``"
