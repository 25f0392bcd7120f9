"""What a student reads beside its time, folded into the weights of a stock network."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from stepdistill.errors import RequestError
from stepdistill.export import export_student, prove, read_settings
from stepdistill.export.formats import adapter
from stepdistill.export.student import Lora
from stepdistill.models.extra_embedding import constant, fold, selectors
from stepdistill.models.roles import Full
from stepdistill.models.roles import Lora as Adapter
from stepdistill.models.schedulers import StockCall
from stepdistill.models.teacher import numbers

TIMES = torch.arange(1000)
EULER = {"vp": StockCall("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True},
                         {"num_inference_steps": 4, "guidance_scale": 1.0}),
         "flow": StockCall("FlowMatchEulerDiscreteScheduler", {"shift": 1.0},
                           {"num_inference_steps": 4, "guidance_scale": 1.0, "sigmas": [1.0, 0.75, 0.5, 0.25]})}


def sinusoids(width: int, times: torch.Tensor) -> torch.Tensor:
    return Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)(times)


@pytest.mark.parametrize("width", [16, 64, 320])
def test_sinusoids_of_all_told_times_carry_a_constant_in_float32(width):
    u = constant(sinusoids(width, TIMES).double())
    between = torch.linspace(0, 999, 4321, dtype=torch.float64)               # a flow may be told any time
    for times in (TIMES, between):
        assert (sinusoids(width, times) @ u.float() - 1).abs().max() < 2e-6
    assert u.abs().max() < 2


def test_features_that_carry_no_constant_are_refused():
    s = torch.linspace(0.1, 1, 1000, dtype=torch.float64)[:, None]
    with pytest.raises(RequestError, match="--to pipeline"):
        constant(s)


@pytest.mark.parametrize("width", [64, 256, 320])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_sinusoids_tell_the_times_of_a_few_steps_apart_in_float32(width, k):
    for times in (1000 * torch.arange(k, 0, -1) / k - 1, 1000 * torch.arange(k, 0, -1) / k):
        s = sinusoids(width, times)
        u = selectors(s.double())
        assert (s @ u.float().T - torch.eye(k)).abs().max() < 5e-6 and u.abs().max() < 0.1


def test_times_that_are_alike_are_refused():
    with pytest.raises(RequestError, match="does not tell these 3 times apart"):
        selectors(sinusoids(64, torch.tensor([999.0, 500.0, 500.0])).double())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("differing", [False, True])
def test_the_folded_layer_is_the_layer_that_reads(trained, differing):
    """W (s + c) at the times of the steps, or at all times where c is one vector, on the base's and on an adapted
    weight."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    weight, module = draw(128, 64) / 8, "time.linear_1"
    state = {f"{module}.lora_A.weight": draw(3, 64) / 8, f"{module}.lora_B.weight": draw(128, 3)} if trained else {}
    lora, times = Lora(state, alpha=5.0, rank=3), torch.tensor([999, 749, 499, 249])
    adapted = lambda lora: weight + (lora.scaling(module) * lora.state[f"{module}.lora_B.weight"]
                                     @ lora.state[f"{module}.lora_A.weight"]
                                     if f"{module}.lora_A.weight" in lora.state else 0)
    c = draw(4, 64) if differing else draw(1, 64).expand(4, 64)
    s, every = sinusoids(64, times), sinusoids(64, TIMES)
    after = lora.extended(module, *fold(c.double(), adapted(lora).double(), s.double(), every.double()))
    if not differing:
        s, c = every, c[:1]
    torch.testing.assert_close(s @ adapted(after).T, (s + c) @ adapted(lora).T, atol=2e-4, rtol=1e-4)
    assert after.rank == 3 and after.metadata()["rank_pattern"] == {r"time\.linear_1": 3 * trained
                                                                    + (4 if differing else 1)}


@pytest.mark.parametrize("reads", [("w",), ("r",), ("w", "r")], ids="+".join)
@pytest.mark.parametrize("kind, to, setting", [
    ("v_prediction", "lora", Adapter(4, 6.0)), ("v_prediction", "pipeline", Adapter(4, 6.0)),
    ("v_prediction", "pipeline", Full()),
    ("sd3", "lora", Adapter(4, 6.0)),
    ("sd3", "lora", Adapter(2, targets=("to_q", "time_text_embed.timestep_embedder.linear_1"))),
    ("sd3", "pipeline", Adapter(4, 6.0)), ("sd3", "pipeline", Full())])
def test_pictures_of_a_folded_student_are_its_samplers(make, tmp_path, kind, to, setting, reads):
    """A stock pipeline, whose network reads its time alone, against our sampler, which tells the student its scale and
    landings."""
    student = make(kind, setting, stock=EULER["flow" if kind == "sd3" else "vp"], reads=reads)
    scale = 3.3 if "w" in reads else None
    found = export_student(student, to, tmp_path / "out", scale)
    assert found.difference < 1e-4 and found.images.std() > 0.05
    settings = read_settings(tmp_path / "out")
    assert settings["fixed_steps"] == ("r" in reads) and settings["keeps"] == (to == "pipeline" and kind != "sd3"
                                                                               and reads == ("w",))
    if setting != Full():
        export_student(student, to, tmp_path / "plain", scale, dtype="float32")
        written = replace(student, lora=adapter(student, student.call, scale) if to == "lora" else None)
        with torch.no_grad():
            # the role's own: what they add is seen in the pictures
            for weight in student.layers.values():
                weight.zero_()
        with pytest.raises(RequestError, match="differs from this run's own sampler"):
            prove(written, tmp_path / "plain", scale)


def test_a_student_reads_its_scale_and_where_its_steps_land(make):
    student = make("sd3", reads=("w", "r"), stock=EULER["flow"])
    found = numbers(student.reads, student.sampler(student.call), 3.0)
    assert found["w"].tolist() == [3.0] * 4 and found["r"].tolist() == pytest.approx([0.75, 0.5, 0.25, 0.0])
    with pytest.raises(RequestError, match="which exit"):
        numbers(("exit",), student.sampler(student.call), None)


def test_what_a_pipeline_s_class_cannot_read_wants_a_scale(make, tmp_path):
    with pytest.raises(RequestError, match="add --guidance W$"):
        export_student(make("sd3", Full(), guidance_embedding=True), "pipeline", tmp_path / "out")
