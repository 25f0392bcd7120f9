"""A student that keeps its guidance leaves so, and a stock call's negative prompt acts on it as on our sampler."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepdistill.errors import RequestError
from stepdistill.export import export_student, load, read_settings
from stepdistill.export.proof import reference
from stepdistill.models.roles import Full, Lora
from stepdistill.models.schedulers import StockCall
from stepdistill.models.stock import pictures
from stepdistill.models.teacher import load_teacher

NEGATIVE, LORA = "a blue square", Lora(4, 6.0)
KEPT = {"guidance_scale": 2.5, "num_inference_steps": 4}
LCM = StockCall("LCMScheduler", {"original_inference_steps": 50}, KEPT)
FLOW = StockCall("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, KEPT | {"sigmas": [1.0, 0.75, 0.5, 0.25]})


def kept(make, kind: str, setting: Lora | Full = LORA):
    return make(kind, setting, stock=FLOW if kind == "sd3" else LCM, negative=NEGATIVE, guidance=2.5)


@pytest.mark.parametrize("kind, setting", [("epsilon", LORA), ("v_prediction", Full()), ("sd3", LORA)])
def test_a_stock_call_with_a_negative_prompt_is_our_sampler(make, tmp_path, kind, setting):
    student = kept(make, kind, setting)
    export_student(student, "lora" if isinstance(setting, Lora) else "pipeline", tmp_path / "out", dtype="float32")
    pipe = load_teacher(student.teacher.source).pipeline()
    call = load(pipe, tmp_path / "out")
    assert call["guidance_scale"] == 2.5 and "negative_prompt" not in call
    pipe.set_progress_bar_config(disable=True)
    prompts, drawn = [*student.prompts, student.prompts[0]], {}
    for negative in (None, NEGATIVE, "two triangles"):
        ours = reference(student, pipe.scheduler, call, None, negative)
        torch.manual_seed(0)
        told = {} if negative is None else {"negative_prompt": negative}
        theirs = pictures(pipe, student.teacher.family.prompts, prompts, generator=torch.Generator().manual_seed(0),
                          **call, **told)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        drawn[negative] = theirs
    assert ((drawn[None] - drawn[NEGATIVE]).abs().max() > 1e-3
            and (drawn["two triangles"] - drawn[NEGATIVE]).abs().max() > 1e-3)


def test_its_card_says_what_it_costs_and_how_a_negative_prompt_is_given(make, tmp_path):
    export_student(kept(make, "epsilon"), "lora", tmp_path / "out")
    settings, card = read_settings(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert settings["negative"] == NEGATIVE and settings["call"] == KEPT
    assert "guidance_scale=2.5, num_inference_steps=4, negative_prompt='a blue square'" in card
    assert ("classifier-free with scale 2.5: two evaluations a step, 8 in all. The student was trained so, and "
            "a negative prompt acts on it, "
            'such as `negative_prompt="a blue square"`') in card


def test_an_export_on_which_no_negative_prompt_acts_is_refused(make, tmp_path):
    student = kept(make, "epsilon")
    unguided = replace(student, call=KEPT | {"guidance_scale": 1.0})
    with pytest.raises(RequestError, match="draws what it does without a negative prompt; nothing was written"):
        export_student(unguided, "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sampler_that_takes_the_null_for_the_negative_is_refused(make, tmp_path, monkeypatch):
    student = kept(make, "epsilon")
    encode = type(student.teacher).encode
    monkeypatch.setattr(type(student.teacher), "encode", lambda self, prompts, negative=False: (
        encode(self, [""] * len(prompts), True) if negative else encode(self, prompts)))
    with pytest.raises(RequestError, match="'negative_prompt': 'a blue square'.* differs from this run's own sampler"):
        export_student(student, "lora", tmp_path / "out")
