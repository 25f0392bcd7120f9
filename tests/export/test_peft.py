"""LoRAs of pipelines that load none by themselves, which leave as folders of peft; and a pipeline whose prompts are
classes."""
from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, PixArtSigmaPipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from stepdistill.errors import RequestError
from stepdistill.export import export_student, load, open_export, read_settings
from stepdistill.export.folder import fresh_pipeline
from stepdistill.models.roles import Full
from stepdistill.models.sources import Source

CLASSES = ("class 3", "tench", "goldfish")


def test_the_folder_is_one_that_peft_reads(make, teachers, tmp_path):
    student = make("pixart")
    export_student(student, "lora", tmp_path, dtype="float32")
    said, config = read_settings(tmp_path), json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["weights"] == "adapter_model.safetensors" and said["format"] == "lora"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 6.0, "LORA")
    written = load_file(tmp_path / said["weights"])
    assert {key.removeprefix("base_model.model.") for key in written} == {*student.lora.state}
    pipe = fresh_pipeline(PixArtSigmaPipeline, Source(str(teachers["pixart"])))
    merged = PeftModel.from_pretrained(pipe.transformer, str(tmp_path)).merge_and_unload().state_dict()
    for key, weight in student.network(student.sampler(student.call), None).state_dict().items():
        torch.testing.assert_close(merged[key], weight)


def test_what_does_not_fit_is_refused_and_leaves_nothing(make, teachers, tmp_path):
    export_student(make("pixart"), "lora", tmp_path)
    pipe = fresh_pipeline(DiTPipeline, Source(str(teachers["dit"])))
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    with pytest.raises(RequestError, match="does not fit this DiTPipeline"):
        load(pipe, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items())
    assert pipe.transformer.state_dict().keys() == before.keys()


@pytest.mark.parametrize("to", ["lora", "pipeline"])
def test_the_snippet_of_a_class_runs(make, tmp_path, monkeypatch, to):
    """Its card asks for a class, and a whole pipeline keeps the names of classes."""
    export_student(make("dit", Full(), prompts=CLASSES) if to == "pipeline" else make("dit", prompts=CLASSES), to,
                   tmp_path / "out")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL).group(1)
    assert "pipe(class_labels=[3], " in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    pipe, settings = open_export(tmp_path / "out")
    assert pipe.labels == {"tench": 0, "Tinca tinca": 0, "goldfish": 1}
    torch.manual_seed(0)
    expected = pipe(class_labels=[3], generator=torch.Generator().manual_seed(0), output_type="np",
                    **settings).images[0]
    np.testing.assert_allclose(np.array(Image.open("sample.png")) / 255, expected, atol=0.51 / 255)
