"""Weights leave rounded to a dtype; the proof is of the rounded student, and what rounding cost is said."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from stepdistill.cli import app
from stepdistill.errors import RequestError
from stepdistill.export import export_student, open_export, read_settings
from stepdistill.export.dtypes import DTYPES, round_, rounded
from stepdistill.models.roles import Full, Lora
from stepdistill.models.sources import Source, absent_parts, index_at


def dtypes(folder: Path) -> set[torch.dtype]:
    """Of all weights of an export; the alphas of kohya's format are numbers beside them."""
    weights = [item for path in folder.rglob("*.safetensors") for item in load_file(path).items()]
    return {value.dtype for key, value in weights if not key.endswith(".alpha")}


def pictures(folder: Path, teacher: Path) -> torch.Tensor:
    pipe, call = open_export(folder, teacher)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = ["a large red ring", "a small blue square on green", "two triangles", "a large red ring"]
        return pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images


@pytest.mark.parametrize("kind,to,guidance_embedding,dtype", [
    ("epsilon", "lora", False, "float16"), ("epsilon", "lora", False, "bfloat16"),
    ("epsilon", "lora", False, "float32"), ("epsilon", "lora", True, "float16"),
    ("epsilon", "comfyui", True, "bfloat16"), ("epsilon", "pipeline", True, "float16"),
    ("sd3", "lora", False, "float16"), ("sd3-t5", "pipeline", False, "bfloat16")])
def test_what_is_written_is_rounded_and_its_cost_is_said(make, tmp_path, teachers, kind, to, guidance_embedding, dtype):
    """The cost stated is the difference of the written student to the float32 export of the same student."""
    guidance = 3.3 if guidance_embedding else None
    export_student(make(kind, guidance_embedding=guidance_embedding), to, tmp_path / "whole", guidance, "float32")
    proof = export_student(make(kind, guidance_embedding=guidance_embedding), to, tmp_path / "out", guidance, dtype)
    settings = read_settings(tmp_path / "out")
    assert dtypes(tmp_path / "out") == {DTYPES[dtype]} and settings["dtype"] == dtype
    assert proof.difference < 1e-5 and settings["proof"]["dtype"] == "float32"
    rough, whole = (pictures(tmp_path / name, teachers[kind]) for name in ("out", "whole"))
    cost = (rough - whole).abs().max().item()
    assert settings["proof"]["rounding"] == pytest.approx(cost, abs=2e-5)
    assert (cost == 0) == (dtype == "float32")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"weights: {dtype}, " in card
    assert dtype == "float32" or f"{settings['proof']['rounding']:.1e} on [0, 1] pixels" in card


@pytest.mark.parametrize("to,dtype", [("lora", "float16"), ("comfyui", "float16"), ("pipeline", "float32")])
def test_the_dtype_unless_given(make, tmp_path, to, dtype):
    """A merged weight in half precision would lose what training changed by less than half a unit in its last place."""
    export_student(make(), to, tmp_path)
    assert dtypes(tmp_path) == {DTYPES[dtype]} and read_settings(tmp_path)["dtype"] == dtype


@pytest.mark.parametrize("kind,dtype", [("epsilon", "float16"), ("sd3-t5", "bfloat16")])
def test_a_pipeline_of_any_dtype_runs_in_a_plain_stock_call(make, tmp_path, kind, dtype):
    export_student(make(kind, Full()), "pipeline", tmp_path, dtype=dtype)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, **absent_parts(index_at(Source(str(tmp_path)))))
    assert {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {torch.float32}
    image = pipe("a red ring", output_type="pt", **read_settings(tmp_path)["call"]).images
    assert image.isfinite().all() and image.std() > 0.05


def test_the_students_own_networks_are_left_as_they_are(make, tmp_path):
    student = make(setting=Full())
    before = {key: value.clone() for key, value in student.teacher.codec.network.state_dict().items()}
    state = {key: value.clone() for key, value in student.role.network.state_dict().items()}
    export_student(student, "pipeline", tmp_path, dtype="float16")
    assert all(torch.equal(value, before[key]) for key, value in student.teacher.codec.network.state_dict().items())
    assert all(torch.equal(value, state[key]) for key, value in student.role.network.state_dict().items())


@pytest.mark.parametrize("setting,to", [(Lora(4, 6.0), "lora"), (Full(), "pipeline")])
def test_rounding_hides_no_other_difference(make, tmp_path, setting, to):
    """An export that differs by 2e-4 before it is rounded is refused, though bfloat16 itself costs more than that."""
    student = make(setting=setting)

    class Off:
        schedule = student.role.schedule

        def __call__(self, x_t, t, cond=None):
            prediction = student.role(x_t, t, cond)
            return replace(prediction, raw=prediction.raw + 2e-3)
    with pytest.raises(RequestError, match=rf"the {to} before it is rounded differs from this run's own sampler"):
        export_student(replace(student, role=Off()), to, tmp_path / "out", dtype="bfloat16")
    assert not list(tmp_path.iterdir())


def test_another_dtype_is_refused(make, tmp_path):
    known = r"no --dtype fp16; there are float16, bfloat16, float32 \(default of --to lora: float16\)"
    with pytest.raises(RequestError, match=known):
        export_student(make(), "lora", tmp_path / "out", dtype="fp16")
    assert not list(tmp_path.iterdir())


def test_the_command_hands_it_on(tmp_path):
    run = shutil.copytree(Path(__file__).parents[1] / "fixtures/version-0.1/run-critic", tmp_path / "run")
    done = CliRunner().invoke(app, ["export", str(run), "--dtype", "float32", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and read_settings(tmp_path / "out")["dtype"] == "float32"


def test_a_value_beyond_the_range_is_refused():
    state = {"a": torch.ones(2), "b": torch.tensor([1.0, -7e4])}
    beyond = r"1 tensors hold values beyond torch.float16 \(at most 65504\), first b with 70000: use --dtype bf"
    with pytest.raises(RequestError, match=beyond):
        rounded(state, torch.float16)
    assert rounded(state, torch.bfloat16)["b"].dtype == torch.bfloat16


def test_rounding_in_place_keeps_the_dtype():
    layer = torch.nn.BatchNorm2d(3)
    torch.nn.init.uniform_(layer.weight)
    before = layer.weight.clone()
    round_(layer, torch.float16)
    assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, before.half().float())
    assert layer.num_batches_tracked.dtype == torch.int64


def test_settings_are_json(make, tmp_path):
    export_student(make(), "lora", tmp_path)
    settings = json.loads((tmp_path / "stepdistill.json").read_text())
    assert {"difference", "tolerance", "images", "sizes", "dtype", "rounding"} == set(settings["proof"])
