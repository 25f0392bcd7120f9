"""Rows as calls of stock pipelines: the counts are kept, the noise is shared, protocols are not mixed."""
from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler, FlowMatchHeunDiscreteScheduler, LCMScheduler
from families import qwen_image, z_image
from families.sana import tiny_sana
from tiny import tiny_pipeline, tiny_sd3

from stepdistill.errors import RequestError
from stepdistill.evaluation.counting import counted
from stepdistill.evaluation.fd import least_samples
from stepdistill.evaluation.plans import Plan, Target, evaluations, plans, solver_scheduler
from stepdistill.evaluation.report import METRICS, read_results
from stepdistill.evaluation.sweep import Evaluation, bench
from stepdistill.files.lock import locked
from stepdistill.models.with_teacher import Help

from .conftest import DIM

SAMPLES = least_samples(DIM)
CALL = {"guidance_scale": 1.0, "num_inference_steps": 4}


def quiet(_: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def teacher() -> Target:
    return Target("teacher", tiny_pipeline())


@pytest.fixture(scope="module")
def student() -> Target:
    pipeline = tiny_pipeline(seed=1)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=4)
    return Target("student", pipeline, "lcm", CALL)


def run(targets, clip_folder, out, nfe=(1, 2), **more):
    return bench(targets, nfe, more.pop("samples", SAMPLES), out, features=[clip_folder], reference="shapes:200",
                 say=quiet, **more)


def test_every_teacher_row_takes_the_evaluations_it_claims(teacher):
    rows = plans(teacher, [1, 2, 6], [1.0, 2.0], ["ddim", "euler", "heun", "dpmpp_2m"], quiet)
    assert {(row.name, row.nfe, row.guidance): row.steps for row in rows} == {
        **{(f"teacher:{solver}", n, 1.0): n for solver in ("ddim", "euler", "dpmpp_2m") for n in (1, 2, 6)},
        **{(f"teacher:{solver}", n, 2.0): n // 2 for solver in ("ddim", "euler", "dpmpp_2m") for n in (2, 6)},
        ("teacher:heun", 1, 1.0): 1, ("teacher:heun", 2, 2.0): 1, ("teacher:heun", 6, 2.0): 2}
    assert [evaluations(row) for row in rows] == [row.nfe for row in rows]


def test_flow_teachers_have_solvers_of_their_own():
    """Every call is given what the teacher's folder says; the network hears it as 20 text tokens rather than 276."""
    messages, lengths, target = [], [], Target("flow", tiny_sd3(shift=3.0), given={"max_sequence_length": 0})
    target.pipeline.transformer.context_embedder.register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1]))
    rows = plans(target, [1, 2, 6], [1.0, 2.0], ["ddim", "euler", "heun", "dpmpp_2m"], messages.append)
    assert {(row.name, row.nfe, row.guidance): row.steps for row in rows} == {
        **{(f"flow:{solver}", n, 1.0): n for solver in ("euler", "dpmpp_2m") for n in (1, 2, 6)},
        **{(f"flow:{solver}", n, 2.0): n // 2 for solver in ("euler", "dpmpp_2m") for n in (2, 6)},
        ("flow:heun", 1, 1.0): 1, ("flow:heun", 2, 2.0): 1, ("flow:heun", 6, 2.0): 2}
    assert [evaluations(row) for row in rows] == [row.nfe for row in rows] and set(lengths) == {20}
    assert messages == ["flow is not run with ddim, which has no form for flow matching"]
    schedulers = {row.name.split(":")[1]: row.scheduler for row in rows}
    assert type(schedulers["heun"]) is FlowMatchHeunDiscreteScheduler and schedulers["heun"].config.shift == 3.0
    assert (type(schedulers["dpmpp_2m"]) is DPMSolverMultistepScheduler
            and schedulers["dpmpp_2m"].config.flow_shift == 3.0)
    assert next(row for row in rows if row.name == "flow:euler" and row.steps == 2).call["sigmas"] == [1.0, 0.5]


def test_solvers_whose_scheduler_takes_no_grid_of_the_pipelines_own_are_left_out():
    """And so is one step of a scheduler with a terminal shift, which divides by zero there."""
    said, target = [], Target("z", z_image.tiny(), given=z_image.CALL)
    rows = plans(target, [1, 4], [1.0, 2.0], ["euler", "heun", "dpmpp_2m"], said.append)
    assert [(row.nfe, row.steps, row.guidance) for row in rows] == [(1, 1, 1.0), (4, 4, 1.0), (4, 2, 2.0)]
    assert [line.split(":")[0] for line in said] == ["z is not run with heun", "z is not run with dpmpp_2m"]
    rows = plans(Target("qwen", qwen_image.tiny(), given=qwen_image.CALL), [1, 2, 4], [1.0, 2.0], ["euler"], quiet)
    assert [(row.nfe, row.steps, row.guidance) for row in rows] == [(2, 2, 1.0), (4, 4, 1.0), (4, 2, 2.0)]
    assert [evaluations(row) for row in rows] == [row.nfe for row in rows]


def test_a_flow_that_comes_with_a_solver_is_swept_as_a_flow():
    given = {"height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": 8}
    rows = plans(Target("flow", tiny_sana(solver=True), given=given), [1, 4], [2.0],
                 ["ddim", "euler", "heun", "dpmpp_2m"], quiet)
    assert [(row.name, row.nfe) for row in rows] == [("flow:euler", 4), ("flow:dpmpp_2m", 4)]
    assert [evaluations(row) for row in rows] == [4, 4]
    assert (rows[0].scheduler.config.shift == rows[1].scheduler.config.flow_shift == 3.0
            and rows[1].scheduler.config.use_flow_sigmas)


@torch.no_grad()
def test_the_solvers_of_a_flow_agree_at_many_steps():
    target = Target("flow", tiny_sd3(shift=3.0), given={"max_sequence_length": 0})
    rows = plans(target, [99], [1.0], ["euler", "heun", "dpmpp_2m"], quiet)
    euler, heun, dpmpp = (row.images(["a red ring"], torch.tensor([0]), 0) for row in rows)
    spread = (rows[0].images(["a blue ring"], torch.tensor([1]), 0) - euler).abs().mean()
    assert max((euler - heun).abs().mean(), (euler - dpmpp).abs().mean()) < 0.02 * spread


def test_counting_leaves_no_trace(teacher):
    network = teacher.pipeline.unet
    with counted(network) as count:
        evaluations(Plan(teacher, "t", teacher.pipeline.scheduler, CALL, 4, 4, 1.0))
    assert "forward" not in vars(network) and count == [4]


def test_student_rows_keep_their_call_and_leave_out_what_the_sampler_does_not_serve(student):
    messages = []
    rows = plans(student, [1, 4, 8], [3.0], ["ddim"], messages.append)
    assert [(row.nfe, row.steps, row.guidance, row.call["num_inference_steps"]) for row in rows] == [(1, 1, 1.0, 1),
                                                                                                     (4, 4, 1.0, 4)]
    assert len(messages) == 1 and "student is not run at 8 steps" in messages[0]


def test_a_companion_that_nobody_asked_for_never_refuses_a_request(teacher, student, clip_folder, tmp_path):
    """One guided step takes two evaluations, so that this teacher has no row at one."""
    beside, messages = replace(teacher, companion=True), []
    assert plans(beside, [1], [2.0], ["ddim"], messages.append) == []
    assert (len(messages) == 1 and "teacher, which stands beside the students, is left out: teacher can be run "
            "at none of nfe=[1]" in messages[0])
    results = run([student, beside], clip_folder, tmp_path, nfe=[1], guidance=[2.0], solvers=["ddim"])
    assert [row["target"] for row in results["rows"]] == ["real", "student"]
    with pytest.raises(RequestError, match="unknown solver 'dmi'"):
        plans(beside, [1], [2.0], ["dmi"], quiet)


def test_real_pictures_are_not_held(clip_folder, monkeypatch):
    """Of the 24 blocks that are given out, the one at work, the one before and the last of the row's first part may be
    alive."""
    context = Evaluation(SAMPLES, features=[clip_folder], reference="shapes:200", say=quiet)
    alive, blocks = [], torch.rand(12, 3, 3, 32, 32) * 2 - 1

    def stream(count, each=None):
        for block in blocks:
            fresh = block.clone()
            alive.append(weakref.ref(fresh))
            assert sum(made() is not None for made in alive) <= 3
            yield fresh
    monkeypatch.setattr(context.source, "real", stream)
    monkeypatch.setattr(context.source, "alike", lambda prompts, each: stream(prompts))
    monkeypatch.setattr(context, "measure",
                        lambda images, alike, captioned, means: {"metrics": {"images": images[0], "alike": alike}})
    row, shown = context.real()
    assert torch.equal(shown, blocks.flatten(0, 1)[:10])
    torch.testing.assert_close(row["metrics"]["images"], context.features.images(blocks.flatten(0, 1)))
    assert row["metrics"]["alike"].shape == (9, 4, DIM)


def test_a_guided_student_pays_for_its_guidance(student):
    guided = Target("guided", student.pipeline, "lcm", CALL | {"guidance_scale": 2.0})
    assert [(row.nfe, row.steps) for row in plans(guided, [1, 2, 4], [], [], quiet)] == [(2, 1), (4, 2)]


def test_rows_with_the_teacher_s_help_count_both_networks(teacher, student, clip_folder, tmp_path):
    """Beside the student's own rows; one step leaves it no turn."""
    told = []
    aided = replace(student, name="student + teacher (diversity)", identity="both",
                    help=Help("diversity", 2.0, teacher.pipeline))
    rows = plans(aided, [1, 2, 4], [1.0], ["ddim"], told.append)
    assert [(row.steps, row.nfe, row.guidance) for row in rows] == [(2, 3, 2.0), (4, 5, 2.0)]
    assert told == ["student + teacher (diversity) is not run at 1 steps: the teacher would draw alone: a student of "
                    "more steps, or a smaller handover, has a turn"]
    assert [evaluations(row) for row in rows] == [3, 5]
    found = {(row["target"], row["nfe"]): row for row in
             run([student, aided], clip_folder, tmp_path / "out", nfe=(2,))["rows"]}
    assert found.keys() == {("real", 0), ("student", 2), ("student + teacher (diversity)", 3)}
    assert found["student + teacher (diversity)", 3]["made"] == {"evaluations": 3.0}
    assert (tmp_path / "out/samples/student + teacher (diversity)-nfe3-w2.png").is_file()


def test_a_judge_s_share_is_planned_and_its_verdicts_are_counted(teacher, student, clip_folder, tmp_path):
    help = Help("adaptive", 2.0, teacher.pipeline, {"teacher_steps": 2}, share=0.5, below=0.0,
                score=lambda pixels, prompts: torch.tensor([float(len(prompt) % 2) - 0.5 for prompt in prompts]))
    row, = plans(replace(student, name="both", help=help), [4], [1.0], ["ddim"], quiet)
    assert row.nfe == 6
    for prompts, sent in ((["a ring", "a disc"], 2), (["a ring", "discs"], 1), (["rings", "a"], 0)):
        with counted(*row.networks) as passed:
            row.images(prompts, torch.arange(2), 0)
        assert passed[0] == 2 * 4 + 4 * sent
        row.check_count(passed[0], 2)
    with pytest.raises(RuntimeError, match="both was planned with 6 network evaluations per image but took 9"):
        row.check_count(18, 2)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_sample_depends_on_its_id_and_not_on_its_batch(teacher, student, name):
    target = {"teacher": teacher, "student": student}[name]           # LCM draws noise at every step
    plan = plans(target, [2], [1.0], ["euler"], quiet)[0]
    prompts, ids = ["a red ring", "a blue cross", "a green square"], torch.tensor([0, 1, 2])
    whole = plan.images(prompts, ids, seed=0)
    assert whole.shape == (3, 3, 16, 16) and whole.abs().max() <= 1
    parts = torch.cat([plan.images(prompts[:1], ids[:1], seed=0), plan.images(prompts[1:], ids[1:], seed=0)])
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, plan.images(prompts, ids, seed=1), atol=1e-3)
    assert not torch.allclose(whole, plan.images(prompts, ids + 1, seed=0), atol=1e-3)


def test_a_row_leaves_the_random_state_and_the_scheduler_alone(teacher):
    own, state = teacher.pipeline.scheduler, torch.random.get_rng_state()
    plans(teacher, [2], [1.0], ["heun", "euler"], quiet)[0].images(["a red ring"], torch.tensor([0]), 0)
    assert teacher.pipeline.scheduler is own and torch.equal(torch.random.get_rng_state(), state)


def test_wrong_requests_teach(teacher, student, clip_folder, tmp_path):
    with pytest.raises(RequestError, match="unknown solver 'dmi'; known are ddim, euler"):
        plans(teacher, [2], [1.0], ["dmi"], quiet)
    with pytest.raises(RequestError, match=r"none of nfe=\[1\]"):
        plans(teacher, [1], [2.0], ["ddim"], quiet)
    with pytest.raises(RequestError, match="real"):
        Target("real", teacher.pipeline)
    other = tiny_pipeline()
    other.scheduler = EDMEulerScheduler()
    with pytest.raises(RequestError, match="EDMEulerScheduler, which holds neither betas nor a flow"):
        solver_scheduler(Target("other", other), "ddim")
    with pytest.raises(RequestError, match="9 samples .* are too few for any figure: at least 10"):
        run([student], clip_folder, tmp_path, samples=9)
    with pytest.raises(RequestError, match="1 or more"):
        run([student], clip_folder, tmp_path, nfe=[0])
    with pytest.raises(RequestError, match="different names"):
        run([student, student], clip_folder, tmp_path)
    with pytest.raises(RequestError, match="empty"):
        run([student], clip_folder, tmp_path, prompts=[])


def test_bench_writes_the_contract(teacher, student, clip_folder, tmp_path):
    results = run([teacher, student], clip_folder, tmp_path, solvers=["ddim"], guidance=[1.0], made={"date": "today"})
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {"id", "features", "dim", "reference", "resize", "dtype"} <= set(results["protocol"])
    assert results["protocol"]["reference"] == "shapes:200@7" and results["protocol"]["dim"] == DIM
    assert [(row["target"], row["nfe"]) for row in results["rows"]] == [
        ("real", 0), ("teacher:ddim", 1), ("teacher:ddim", 2), ("student", 1), ("student", 2)]
    for row in results["rows"]:
        assert list(row) == ["target", "method", "nfe", "steps", "guidance", "samples", "seed", "metrics", "latency_ms",
                             "images_per_s", "made"]
        assert list(row["metrics"]) == [name + end for name in METRICS for end in ("", "_low", "_high")]
        assert all(isinstance(row["metrics"][name], float) for name in METRICS)
        assert row["metrics"]["diversity_low"] is None, "of one prompt"
        for name in [name for name in METRICS if name != "diversity"]:
            low, value, high = (row["metrics"][name + end] for end in ("_low", "", "_high"))
            assert low <= value <= high and (low < high or value in (0, 1)), name
    assert results["rows"][-1]["method"] == "lcm" and results["rows"][1]["method"] is None
    assert results["rows"][1]["latency_ms"] > 0 and results["rows"][1]["images_per_s"] > 0
    assert results["rows"][0]["made"] == results["rows"][-1]["made"] == {"date": "today"}
    page = (tmp_path / "report.html").read_text()
    drawings = ("curve", "narrow curve", "front")
    assert page.count("data:image/png;base64,") == len(drawings) + len(results["rows"]) and "http" not in page
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_frechet_distance_of_too_few_samples_is_not_taken_and_kid_stands_for_it(student, clip_folder, tmp_path):
    said = []
    results = bench([student], (1, 2), SAMPLES - 1, tmp_path, features=[clip_folder], reference="shapes:200",
                    say=said.append)
    assert any(f"{SAMPLES - 1} samples are too few for a Fréchet distance in {DIM} dimensions, which takes at least "
               f"{SAMPLES}: in" in line
               for line in said)
    for row in results["rows"]:
        assert (row["metrics"]["fd"] is row["metrics"]["fd_low"] is None and row["metrics"]["kid_low"]
                < row["metrics"]["kid"])
    assert any("student, 1 NFE, w = 1: KID 0." in line or "student, 1 NFE, w = 1: KID -0." in line for line in said)
    assert "Kernel" not in (tmp_path / "report.html").read_text() and (tmp_path / "curve.png").is_file()
    assert read_results(tmp_path / "results.json") == results


def test_distances_in_several_feature_spaces(student, clip_folder, tmp_path):
    """One alone misranks. The others' figures stand beside, and enter the protocol."""
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    alone = run([student], clip_folder, tmp_path / "alone")
    results = bench([student], (1, 2), SAMPLES, tmp_path / "both", features=[clip_folder, module],
                    reference="shapes:200", say=quiet)
    (name,) = results["protocol"]["also"]
    assert name.startswith("Sequential@") and results["protocol"]["id"] != alone["protocol"]["id"]
    for row, before in zip(results["rows"], alone["rows"], strict=True):
        assert row["metrics"] == before["metrics"] and row["also"][name]["fd_low"] < row["also"][name]["fd_high"]
        assert row["also"][name]["cmmd"] is None and "also" not in before
    assert f"Distances in {name} too: real" in (tmp_path / "both/report.html").read_text()
    assert read_results(tmp_path / "both/results.json") == results
    only = bench([student], (1, 2), SAMPLES, tmp_path / "module", features=[module], reference="shapes:200", say=quiet)
    assert [row["metrics"]["fd"] for row in only["rows"]] == [row["also"][name]["fd"] for row in results["rows"]]


def test_pictures_that_are_no_numbers_are_counted(student, clip_folder, tmp_path, monkeypatch):
    drawn = Plan.images

    def broken(self, prompts, ids, seed):
        pixels = drawn(self, prompts, ids, seed)
        pixels[ids == 3] = torch.nan
        return pixels
    monkeypatch.setattr(Plan, "images", broken)
    with pytest.raises(RequestError, match=f"1 of {SAMPLES + 3} pictures of student at 1 NFE have pixels that are "
                       "no finite number"):
        run([student], clip_folder, tmp_path)


def test_rows_of_one_protocol_join_and_others_are_refused(teacher, student, clip_folder, tmp_path):
    first = run([teacher], clip_folder, tmp_path / "a", nfe=[1], solvers=["ddim"], guidance=[1.0])
    both = run([student], clip_folder, tmp_path / "a", nfe=[1])
    assert [row["target"] for row in both["rows"]] == ["real", "teacher:ddim", "student"]
    assert both["rows"][1] == first["rows"][1]
    with pytest.raises(RequestError, match="seed is 0 there and 1 here"):
        run([student], clip_folder, tmp_path / "a", nfe=[1], seed=1)
    with pytest.raises(RequestError, match="samples is 51 there and 52 here"):
        run([student], clip_folder, tmp_path / "b", nfe=[1], samples=52, reuse=[tmp_path / "a" / "results.json"])


def test_reused_rows_are_not_measured_again(teacher, clip_folder, tmp_path, monkeypatch):
    first = run([teacher], clip_folder, tmp_path / "a", nfe=[1], solvers=["ddim"], guidance=[1.0])
    monkeypatch.setattr(Evaluation, "row", None)
    monkeypatch.setattr(Evaluation, "real", None)
    again = run([teacher], clip_folder, tmp_path / "b", nfe=[1], solvers=["ddim"], guidance=[1.0],
                reuse=[tmp_path / "a" / "results.json"])
    assert [row["metrics"] for row in again["rows"]] == [row["metrics"] for row in first["rows"]]
    assert all(row["latency_ms"] is None for row in again["rows"])


def test_a_stopped_bench_keeps_its_finished_rows(student, clip_folder, tmp_path, monkeypatch):
    row = Evaluation.row

    def stop_at_two(self, plan, *rest):
        if plan.nfe == 2:
            raise KeyboardInterrupt
        return row(self, plan, *rest)

    monkeypatch.setattr(Evaluation, "row", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        run([student], clip_folder, tmp_path)
    before = read_results(tmp_path / "results.json")["rows"]
    assert [row["target"] for row in before] == ["real", "student"]

    measured = []
    monkeypatch.setattr(Evaluation, "row", lambda self, plan, *rest: measured.append(plan.nfe)
                        or row(self, plan, *rest))
    assert run([student], clip_folder, tmp_path)["rows"][:2] == before and measured == [2], "it goes on"
    assert not (tmp_path / "unfinished.json").exists() and not (tmp_path / ".lock").exists()
    run([student], clip_folder, tmp_path)
    assert measured == [2, 1, 2], "a bench that ended is made anew"


def test_a_stopped_bench_measures_a_changed_student_anew(student, clip_folder, tmp_path, monkeypatch):
    row, measured = Evaluation.row, []

    def stop_at_two(self, plan, *rest):
        if plan.nfe == 2:
            raise KeyboardInterrupt
        return measured.append(plan.nfe) or row(self, plan, *rest)

    monkeypatch.setattr(Evaluation, "row", stop_at_two)
    for identity in ("trained", "trained on", "trained on"):
        with pytest.raises(KeyboardInterrupt):
            run([replace(student, identity=identity)], clip_folder, tmp_path)
    assert measured == [1, 1]
    (tmp_path / "unfinished.json").write_text('{"protocol": 3}')
    with pytest.raises(RequestError, match="unfinished.json is damaged: what it holds has no measured, targets. "
                       "Remove it"):
        run([student], clip_folder, tmp_path)


def test_one_bench_at_a_time_writes_into_a_folder(student, clip_folder, tmp_path):
    with locked(tmp_path / ".lock", "it"), pytest.raises(RequestError, match="is in use by process"):
        run([student], clip_folder, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"protocol": {}, "rows": [{}]}', '{"protocol": null, "rows": null}'])
def test_damaged_results_are_named(student, clip_folder, tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RequestError, match="results.json is damaged"):
        read_results(tmp_path / "results.json")


def test_own_prompts_that_are_no_captions_are_not_judged(student, clip_folder, tmp_path):
    results = run([student], clip_folder, tmp_path, nfe=[1], prompts=["a photo of a cat"])
    real, row = (r["metrics"] for r in results["rows"])
    assert real["clip_score"] is None and real["diversity"] is None and row["all_attributes"] is None
    assert isinstance(row["clip_score"], float) and isinstance(row["diversity"], float)


def test_a_network_that_evaluates_more_than_planned_is_caught(student, clip_folder, tmp_path):
    context = Evaluation(SAMPLES, features=[clip_folder], reference="shapes:200", say=quiet)
    plan = Plan(student, "student", student.pipeline.scheduler, CALL | {"num_inference_steps": 2}, 1, 1, 1.0)
    with pytest.raises(RuntimeError, match="planned with 1 network evaluations per image but took 2"):
        context.row(plan)
