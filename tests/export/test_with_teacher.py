"""A stock pipeline that samples with the teacher draws what our sampler draws, and asks both networks as often as it
says."""
from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image

from stepdistill.diffusion.collaboration import system
from stepdistill.errors import RequestError
from stepdistill.evaluation.counting import counted
from stepdistill.export import Student, export_student, open_export
from stepdistill.export.proof import SEED, sampled
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.schedulers import StockCall
from stepdistill.models.stock import pictures
from stepdistill.models.with_teacher import with_teacher

sys.path.insert(0, str(Path(__file__).parents[1]))
from families.dit import tiny_dit
from proofs.planting import Fault, plant
from tiny import tiny_pipeline

W = 3.0
HALF = {"score": lambda pixels: torch.arange(len(pixels)) % 2, "below": 1}       # every second picture goes back
SYSTEMS = [("diversity", {}), ("diversity", {"teacher_steps": 3, "handover": 2}), ("diversity", {"handover": 4}),
           ("distillation_pp", {"weight": 0.5, "guided_steps": 2}), ("adaptive", HALF)]
KINDS = ["epsilon", "v_prediction", "sd3", "pixart", "sana"]


@pytest.fixture(scope="module")
def opened(request, tmp_path_factory) -> Callable[[str], tuple[Student, Path]]:
    """opened(kind): a student and its export in float32, so that only how they sample can differ."""
    known: dict[str, tuple[Student, Path]] = {}

    def one(kind: str) -> tuple[Student, Path]:
        if kind not in known:
            student = request.getfixturevalue("make")(kind)
            folder = tmp_path_factory.mktemp(kind) / "lora"
            export_student(student, "lora", folder, dtype="float32")
            known[kind] = student, folder
        return known[kind]
    return one


def ours(student: Student, pipe: DiffusionPipeline, call: dict, name: str, guidance: float, options: dict
         ) -> torch.Tensor:
    """Our sampler's pictures by the same schedule of roles, in [0, 1]."""
    options, teacher = dict(options), student.teacher
    score, below = options.pop("score", None), options.pop("below", None)
    together = system(name, student.sampler(call), teacher.schedule, guidance, **options)
    judge = None if score is None else lambda x0: score(x0) < below
    base = Denoiser(teacher, teacher.network)                      # outside its bank's `use`: the base alone
    with torch.no_grad():
        return sampled(teacher, lambda role, *given: together(role, base, *given, judge), student.role,
                       teacher.encode(list(student.prompts)))


def stock(pipe: DiffusionPipeline, student: Student, call: dict) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return pictures(pipe, student.teacher.family.prompts, student.prompts,
                        generator=torch.Generator().manual_seed(SEED), **call)


def apart(opened, kind: str, name: str, options: dict, guidance: float = W, **more) -> float:
    """The largest difference of a pixel between the stock pipeline and our sampler."""
    student, folder = opened(kind)
    pipe, call = open_export(folder, fused=False)
    with with_teacher(pipe, name, call, guidance=guidance, **options, **more) as together:
        found = stock(pipe, student, together.call)
    return (found - ours(student, pipe, call, name, guidance, options)).abs().max().item()


@pytest.mark.parametrize("kind,name,options", [
    pytest.param(kind, name, options, marks=() if kind in ("epsilon", "sd3") or i == 1 else pytest.mark.long)
    for kind in KINDS for i, (name, options) in enumerate(SYSTEMS)])
def test_the_stock_pipeline_draws_what_our_sampler_draws(opened, kind, name, options):
    assert apart(opened, kind, name, options) <= 1e-4


@pytest.mark.parametrize("kind", ["epsilon", "sd3"])
def test_a_teacher_without_guidance_is_asked_once(opened, kind):
    assert apart(opened, kind, "diversity", {"teacher_steps": 2}, guidance=1.0) <= 1e-4


@pytest.mark.parametrize("kind", ["epsilon", "sd3"])
def test_a_fused_student_beside_its_base_draws_the_same(opened, kind):
    """As exports are sampled: the teacher is a pipeline of its own."""
    student, folder = opened(kind)
    fused, call = open_export(folder)
    base = type(fused)(**{**fused.components, **open_base(student)})
    for name, options in SYSTEMS[1::2]:
        with with_teacher(fused, name, call, guidance=W, teacher=base, **options) as together:
            found = stock(fused, student, together.call)
        assert (found - ours(student, fused, call, name, W, options)).abs().max() <= 1e-4


def open_base(student: Student) -> dict:
    pipe = student.teacher.pipeline()
    return {student.teacher.family.denoiser: pipe.components[student.teacher.family.denoiser],
            "scheduler": pipe.scheduler}


@pytest.mark.parametrize("name,options,student_s,teacher_s", [
    ("diversity", {}, 3, 2), ("diversity", {"teacher_steps": 3, "handover": 2}, 2, 6), ("distillation_pp", {}, 4, 2),
    ("diversity", {"handover": 0}, 4, 0), ("adaptive", {**HALF, "teacher_steps": 3}, 4, 4)])
def test_both_networks_are_asked_as_often_as_it_says(opened, name, options, student_s, teacher_s):
    """Of three pictures adaptive sends back the first and the third: 2 of 3, 3 guided steps each."""
    student, folder = opened("epsilon")
    pipe, call = open_export(folder, fused=False)
    with counted(pipe.unet) as passed:
        with with_teacher(pipe, name, call, guidance=W, **options) as together:
            stock(pipe, student, together.call)
    assert together.evaluations == {"student": 3 * student_s, "teacher": 3 * teacher_s}
    assert passed[0] == sum(together.evaluations.values())
    if name != "adaptive":
        assert passed[0] == 3 * together.nfe == 3 * (student_s + teacher_s)


def test_a_call_leaves_no_trace(opened):
    student, folder = opened("epsilon")
    pipe, call = open_export(folder, fused=False)
    before, scheduler = stock(pipe, student, call), pipe.scheduler
    with with_teacher(pipe, "diversity", call, guidance=W) as together:
        first, second = (stock(pipe, student, together.call) for _ in range(2))
    assert torch.equal(first, second) and (first - before).abs().max() > 1e-2
    assert pipe.scheduler is scheduler and "forward" not in vars(pipe.unet)
    assert torch.equal(stock(pipe, student, call), before)
    with pytest.raises(ZeroDivisionError):
        with with_teacher(pipe, "diversity", call, guidance=W):
            1 / 0                                      # noqa: B018
    assert pipe.scheduler is scheduler and torch.equal(stock(pipe, student, call), before)


def test_what_each_turn_decides_is_seen(opened):
    """The last x_0 is the picture; those who were not sent back keep theirs."""
    student, folder = opened("epsilon")
    pipe, call = open_export(folder, fused=False)
    with with_teacher(pipe, "adaptive", call, guidance=W, **HALF) as together:
        with pytest.raises(RequestError, match="nothing was drawn yet"):
            together.x0()
        found = stock(pipe, student, together.call)
        seen = together.x0()
    assert len(seen) == len(together.turns) == 8
    assert (seen[-1] / 2 + 0.5 - found).abs().max() <= 1e-4
    assert torch.allclose(seen[3][1], seen[7][1], atol=1e-4) and (seen[3][0] - seen[7][0]).abs().max() > 1e-2
    assert [turn.words for turn in together.turns[3:5]] == ["student, t = 0.26", "teacher, w = 3, t = 0.4"]


class TestOfOthers:
    """A LoRA that somebody else made, under a scheduler that its card names, beside a style's."""

    @pytest.fixture
    def pipe(self, opened) -> Iterator[StableDiffusionPipeline]:
        student, folder = opened("epsilon")
        pipe = tiny_pipeline()
        pipe.load_lora_weights(folder, adapter_name="turbo")
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        yield pipe

    CALL = {"num_inference_steps": 4, "guidance_scale": 1.0}

    def drawn(self, pipe, call):
        return pipe(["a red ring"] * 2, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images

    def test_the_teacher_is_the_base_with_the_style(self, opened, pipe):
        """Teacher and student are one where the student's weight is zero: then who takes which step makes no
        difference to a sampler by ODE steps."""
        pipe.load_lora_weights(opened("epsilon")[1], adapter_name="style")
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        pipe.set_adapters(["style", "turbo"], [0.7, 0.0])
        with pytest.raises(RequestError, match="the active adapters are style, turbo: say which is the student, such "
                           "as adapter='turbo'"):
            with with_teacher(pipe, "diversity", self.CALL, guidance=1.0):
                pass
        known = self.drawn(pipe, self.CALL)
        with with_teacher(pipe, "diversity", self.CALL, guidance=1.0, adapter="turbo") as together:
            assert (self.drawn(pipe, together.call) - known).abs().max() <= 1e-4
        with with_teacher(pipe, "diversity", self.CALL, guidance=1.0, adapter="style") as together:
            assert (self.drawn(pipe, together.call) - known).abs().max() > 1e-2

    def test_euler_s_state_is_handed_over_in_our_terms(self, opened, pipe):
        """EulerDiscreteScheduler keeps x / alpha: with a student of weight zero the picture is that of the base."""
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        pipe.set_adapters(["turbo"], [0.0])
        with with_teacher(pipe, "diversity", self.CALL, guidance=1.0, handover=4, teacher_steps=4) as together:
            teacher = self.drawn(pipe, together.call)
        with with_teacher(pipe, "diversity", self.CALL, guidance=1.0) as together:
            assert (self.drawn(pipe, together.call) - teacher).abs().max() <= 1e-4

    def test_half_precision_of_its_noise(self, pipe):
        with with_teacher(pipe.to(torch.bfloat16), "distillation_pp", self.CALL, guidance=W) as together:
            assert self.drawn(pipe, together.call).isfinite().all()

    @pytest.mark.parametrize("words,change", {
        "carries no active LoRA.*load the LoRA and do not fuse it, or pass the base as `teacher`":
            lambda pipe, call: pipe.unload_lora_weights(),
        "is fused into the weights of this UNet2DConditionModel": lambda pipe, call: pipe.fuse_lora(),
        "called with a guidance scale of 2, and beside a teacher it is called without":
            lambda pipe, call: call.update(guidance_scale=2.0),
        "says its num_inference_steps; found guidance_scale": lambda pipe, call: call.pop("num_inference_steps"),
        "the student's sampler cannot be shared with a teacher: no sampler reads a PNDMScheduler":
            lambda pipe, call: setattr(pipe, "scheduler",
                                              PNDMScheduler.from_config(pipe.scheduler.config)),
    }.items())
    def test_what_does_not_fit_is_refused(self, pipe, words, change):
        call = dict(self.CALL)
        change(pipe, call)
        with pytest.raises(RequestError, match=words):
            with with_teacher(pipe, "diversity", call, guidance=W):
                pass

    def test_a_judge_is_wanted_by_adaptive_alone(self, pipe):
        for name, more, words in (("adaptive", {}, "pass `score`"), ("diversity", HALF, "diversity judges no pictures"),
                                  ("adaptive", {"score": HALF["score"]}, "and `below`, the score that is too low")):
            with pytest.raises(RequestError, match=words):
                with with_teacher(pipe, name, self.CALL, guidance=W, **more):
                    pass
        with with_teacher(pipe, "adaptive", self.CALL, guidance=W, score=lambda x: x, below=0.0) as together:
            with pytest.raises(RequestError, match="score should give 2 finite numbers, one a picture"):
                self.drawn(pipe, together.call)

    @pytest.mark.parametrize("words,changes", {
        "their schedules differ: at t = 0.*A student of this teacher's noise would be right":
            {"beta_end": 0.02}, "their schedules differ": {"rescale_betas_zero_snr": True},
        "predicts eps, the student's v: a LoRA of this teacher would be right": {"prediction_type": "v_prediction"},
    }.items())
    def test_a_teacher_of_another_noise_is_refused(self, pipe, words, changes):
        teacher = tiny_pipeline()
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, **changes)
        with pytest.raises(RequestError, match=words):
            with with_teacher(pipe, "diversity", self.CALL, guidance=W, teacher=teacher):
                pass

    def test_a_teacher_of_another_kind_is_refused(self, pipe, opened):
        flow, _ = open_export(opened("sd3")[1])
        with pytest.raises(RequestError, match="the teacher of a StableDiffusionPipeline is one too; found a "
                           "StableDiffusion3Pipeline"):
            with with_teacher(pipe, "diversity", self.CALL, guidance=W, teacher=flow):
                pass


def test_a_pipeline_that_guides_otherwise_is_refused(opened):
    with pytest.raises(RequestError, match="a DiTPipeline is not sampled with the teacher: served are "
                       "StableDiffusionPipeline"):
        with with_teacher(tiny_dit(), "diversity", {"num_inference_steps": 4}, guidance=W):
            pass


@pytest.mark.parametrize("kind,more", [("epsilon", {"guidance": 2.5}), ("sd3", {"guidance": (2.0, 4.0)})])
def test_the_card_says_how_and_its_snippet_runs(make, tmp_path, monkeypatch, kind, more):
    """From the folder where the export was made, as it stands; the picture is the one that the function draws."""
    export_student(make(kind, **more), "lora", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "## With the teacher's help" in card and f"guidance={2.5 if kind == 'epsilon' else 3:g})" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})                                      # noqa: S102
    pipe, call = open_export(tmp_path / "out", fused=False)
    torch.manual_seed(0)
    with with_teacher(pipe, "diversity", call, guidance=2.5 if kind == "epsilon" else 3.0) as together:
        drawn = pipe("a large red ring", generator=torch.Generator().manual_seed(0), **together.call).images[0]
    found, known = (numpy.asarray(image).astype(int) for image in (Image.open("with_teacher.png"), drawn))
    assert abs(found - known).max() <= 1


@pytest.mark.parametrize("to,change", [("comfyui", {}), ("lora", {"num_inference_steps": 1})])
def test_a_card_is_silent_where_the_base_cannot_help(make, tmp_path, to, change):
    stock = StockCall("LCMScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 1.0, **change})
    export_student(make(stock=stock), to, tmp_path / "out")
    assert "With the teacher's help" not in (tmp_path / "out/README.md").read_text()


FAULTS = {
    "the teacher at another scale": (".call(guidance if doubled else 1.0)", ".call(guidance + 1 if doubled else 1.0)"),
    "the adapter stays on for the teacher": ('if turn.role == "teacher" else nullcontext()', "if False else "
                                             "nullcontext()"),
    "the adapter is off for the student": ('if turn.role == "teacher" else nullcontext()', ""),
    "the student reads no prompt": ("torch.arange(batch)[batch - half if turn.passes == 1 else 0:]",
                                    "torch.arange(batch)[:half] if turn.passes == 1 else torch.arange(batch)"),
    "the network is told the time of another turn": ("turn.evaluation.time for turn in",
                                                     "turn.evaluation.landing for turn in"),
    "all are sent back": ("rows = rows[chosen.cpu()[rows % half]]", "rows = rows[chosen.cpu()[rows % half] * 0 == 0]"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(opened, name, monkeypatch):
    opened("epsilon")
    old, new = FAULTS[name]
    plant(monkeypatch, Fault(name, "models.with_teacher", old, new, ()))
    if name == "all are sent back":
        with pytest.raises(AssertionError):
            test_both_networks_are_asked_as_often_as_it_says(opened, "adaptive", {**HALF, "teacher_steps": 3}, 4, 4)
    else:
        assert apart(opened, "epsilon", "diversity", {}) > 1e-3
