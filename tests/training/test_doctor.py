"""The doctor of a run: each sickness is caused in a small real training and named, a healthy one raises nothing, and
training is the same to the bit with it and without."""
from __future__ import annotations

import json
import logging

import pytest
import torch

from stepdistill.errors import Stopped
from stepdistill.training import checkpoints
from stepdistill.training.doctor import SIGNALS, Relapse, tail
from stepdistill.training.tracking import truncate

from .patient import PROMPTS, right, small_run, with_patient

# of healthy runs of this student: test_healthy holds that it keeps them
BANDS = {"diversity/student": [0.5, 1.5], "spread/student": [0.5, 1.5], "detail/student": [0.5, 1.5],
         "following/student": [0.5, 1.0],
         "offset/student": [0.0, 0.3], "saturation/student": [0.0, 0.1], "moved/student": [0.0, 0.1],
         "clipped/student": [0.0, 0.9]}


def rows(folder):
    return [json.loads(line) for line in (folder / SIGNALS).read_text().splitlines()]


def treated(folder, caplog, *, prepare=lambda trainer, doctor: None, **options):
    """The names of all that the doctor said while it looked on, and those that hold at the end."""
    caplog.set_level(logging.WARNING)
    trainer, doctor = small_run(folder, **{"bands": BANDS} | options)
    prepare(trainer, doctor)
    trainer.train()
    said = [record.message for record in caplog.records if "What helps: " in record.message]
    return said, {finding.name for finding in doctor.judged()}


def test_a_healthy_run_raises_nothing(tmp_path, caplog):
    said, found = treated(tmp_path, caplog)
    assert said == [] and found == set()
    last = rows(tmp_path)[-1]
    assert [row["step"] for row in rows(tmp_path)] == list(range(0, 61, 4))
    assert (last["diversity/student"] == pytest.approx(1, abs=0.1) and last["following/student"] > 0.98
            and last["detail/student"] == pytest.approx(1, abs=0.1))
    assert last["leak/teacher"] == last["drift/teacher"] == 0 and last["unheard/student"] == 0


def one_picture(noise, label, progress):
    return right(torch.zeros_like(noise), torch.zeros_like(label))


def one_colour(noise, label, progress):
    return right(noise, label).mean((2, 3), keepdim=True).expand_as(noise)


def fewer_and_fewer(noise, label, progress):
    return right(noise * max(0.0, min(1.0, 1.5 - 2 * progress)), label)


def captions_of_others(noise, label, progress):
    return right(noise, (label + 1) % PROMPTS)


@pytest.mark.parametrize(("taught", "name"), [(one_picture, "one picture for all"), (one_colour, "constant pictures"),
                                              (captions_of_others, "wrong captions")])
def test_a_student_that_is_taught_wrongly(tmp_path, caplog, taught, name):
    said, found = treated(tmp_path, caplog, taught=taught)
    assert name in found and any(f"{name}: " in line for line in said)


def test_a_slow_collapse_of_diversity_is_said_before_the_band_is_left(tmp_path, caplog):
    said, _ = treated(tmp_path, caplog, taught=fewer_and_fewer, updates=120,
                      bands=BANDS | {"diversity/student": [0.1, 1.5], "spread/student": [0.1, 1.5]})
    assert "diversity falls: " in said[0]
    step = int(said[0].split(":")[0].removeprefix("step "))
    assert next(row for row in rows(tmp_path) if row["step"] == step)["diversity/student"] > 0.1


def test_a_rate_a_hundred_times_too_high(tmp_path, caplog):
    _, found = treated(tmp_path, caplog, lr=2.0)
    assert "rate too high" in found


def test_a_frozen_student(tmp_path, caplog):
    said, found = treated(tmp_path, caplog, lr=1e-14)
    assert "frozen student" in found and "wrong adapter" not in found


def test_an_adapter_that_is_not_the_sampled_one(tmp_path, caplog):
    still = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    said, found = treated(tmp_path, caplog, prepare=lambda trainer, doctor: with_patient(doctor, sample=lambda: still))
    assert "wrong adapter" in found and "what is trained is not what is sampled" in "".join(said)


def test_a_gradient_that_leaks_into_the_teacher(tmp_path, caplog):
    def leak(trainer, doctor):
        base = trainer.roles["teacher"].requires_grad_(True)
        loss = trainer.updates[0].loss
        object.__setattr__(trainer.updates[0], "loss", lambda batch, step: loss(batch, step) | {
            "leak": 0.1 * (base(trainer.roles["student"](step.normal("more", (2, 4, 4)),
                                                         batch.cond.label).flatten(1))).square().mean()})
    said, found = treated(tmp_path, caplog, prepare=leak)
    assert "gradients reach the teacher" in found and "the teacher changes" not in found


def test_a_teacher_that_is_trained_with_the_student(tmp_path, caplog):
    def tied(trainer, doctor):
        optimizer = trainer.optimizers["student"]
        optimizer.adamw.add_param_group({"params": list(trainer.roles["teacher"].requires_grad_(True).parameters())})
        trainer.on_step.insert(0, lambda step: [p.add_(0.01)
                                                for p in trainer.roles["teacher"].requires_grad_(False).parameters()])
    _, found = treated(tmp_path, caplog, prepare=tied)
    assert "the teacher changes" in found


def test_samples_that_are_not_finite_are_said_at_once(tmp_path, caplog):
    sick = lambda trainer, doctor: with_patient(doctor, sample=lambda: torch.full((16, 2, 4, 4), float("nan")))
    said, found = treated(tmp_path, caplog, prepare=sick, updates=4)
    assert found == {"overflow"} and "of step 0 are not finite" in said[0]
    assert "spread/student" not in rows(tmp_path)[0]


# -- it changes nothing ----------------------------------------------------------------------------------------------

def test_training_is_the_same_to_the_bit_with_it_and_without(tmp_path):
    small_run(tmp_path / "with", every=3, log_every=5, updates=11)[0].train()
    trainer, _ = small_run(tmp_path / "without", log_every=5, updates=11)
    trainer.on_step, trainer.on_start = [], []
    trainer.train()
    assert (tmp_path / "with/metrics.jsonl").read_bytes() == (tmp_path / "without/metrics.jsonl").read_bytes()
    one, two = (checkpoints.load(checkpoints.latest(tmp_path / name)) for name in ("with", "without"))
    assert all(torch.equal(one[group][name], two[group][name]) for group in one for name in one[group])


def test_global_generators_are_as_they_were(tmp_path):
    trainer, doctor = small_run(tmp_path)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    doctor.start(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_its_rows_are_cut_to_the_step_that_is_gone_on_from(tmp_path):
    small_run(tmp_path / "whole", updates=24, checkpoint_every=8)[0].train()
    small_run(tmp_path / "parts", updates=16, checkpoint_every=8)[0].train()
    (tmp_path / "parts/checkpoints/step-000016").rename(tmp_path / "gone")
    small_run(tmp_path / "parts", updates=24, checkpoint_every=8)[0].train(resume=True)
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    # against the look before, which the first one after a resumption has not
    held = ("changed/", "unheard/")
    assert [row["step"] for row in whole] == [row["step"] for row in parts] == [0, 4, 8, 12, 16, 20, 24]
    for one, two in zip(whole, parts, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(held)} == {k: v for k, v in two.items()
                                                                            if not k.startswith(held)}


def test_the_end_of_a_long_log_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.training.doctor.TAIL", 60)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "student/match": 0.5}) + "\n" for i in range(1, 9))
                    + '{"step": 9, "stud')
    assert [row["step"] for row in tail(path)] == [8] and tail(tmp_path / "none") == []


# -- what is done about it -------------------------------------------------------------------------------------------

def test_stop(tmp_path, caplog):
    with pytest.raises(Stopped, match=r"^stopped after step \d+, as train.doctor asks: wrong captions: .*\(since "
                       r"step \d+\). What helps: .* is kept"):
        treated(tmp_path, caplog, taught=captions_of_others, then="stop", checkpoint_every=10)
    assert len(rows(tmp_path)) < 16 and checkpoints.latest(tmp_path) is not None


def test_relapse(tmp_path, caplog):
    with pytest.raises(Relapse) as caught:
        treated(tmp_path, caplog, lr=2.0, then="rollback")
    assert caught.value.finding.since <= 12


def test_signals_are_read_back_by_the_one_reader(tmp_path):
    from stepdistill.files import records
    small_run(tmp_path, updates=8)[0].train()
    assert truncate(tmp_path / SIGNALS, 4, records.Signals) == [row for row in rows(tmp_path)]
    assert [row["step"] for row in rows(tmp_path)] == [0, 4]
