"""A run of a recipe and its doctor: sicknesses of roles, guidance and rates, the way back, and what a run folder
says."""
from __future__ import annotations

import json

import pytest
import torch

from stepdistill import api
from stepdistill.errors import RequestError, Stopped
from stepdistill.models.adapters import AdapterBank
from stepdistill.run.health import Pieces, health
from stepdistill.training import checkpoints

SHORT = {"train.updates": 24, "train.warmup": 0, "train.decay": "constant", "train.log_every": 2,
         "train.doctor_every": 2, "data.batch": 16}


def rows(run):
    return [json.loads(line) for line in (run / "signals.jsonl").read_text().splitlines()]


def names(run):
    return {finding.name for one in health(run) for finding in (*one.now, *one.was)}


def trained(folder, name, **changes):
    return api.train(name, out=folder / "run",
                     **SHORT | {key.replace("__", "."): value for key, value in changes.items()})


def test_a_critic_that_is_starved(tmp_path):
    run = trained(tmp_path, "toy/dmd2-1step", critic__lr=1e-8, settings__critic_steps=1)
    found = {finding.name: finding for finding in health(run)[0].now}
    assert "raise critic_steps from 1 to 5, or raise critic.lr from 1e-08" in found["critic lags"].helps
    assert "critic lags: " in (run / "train.log").read_text()


def test_a_rate_a_hundred_times_too_high(tmp_path):
    run = trained(tmp_path, "toy/lcm", train__lr=0.2)
    assert "rate too high" in names(run) and "lower train.lr from 0.2 to 0.02" in (run / "train.log").read_text()


def test_guidance_that_is_ten_times_too_high(tmp_path):
    run = trained(tmp_path, "toy/lcm", guidance=30.0)
    assert "guidance too high" in names(run) and "lower guidance from 30 to 7.5" in (run / "train.log").read_text()
    assert rows(run)[0]["saturation/teacher"] > 0.2


def test_a_discriminator_that_is_dead(tmp_path):
    run = trained(tmp_path, "toy/ladd", discriminator__lr=1e-14)
    assert "dead discriminator" in names(run)


def test_an_overflow_is_named_with_the_place_where_it_arose(tmp_path):
    with pytest.raises(Stopped, match="not finite|is nan|is inf"):
        trained(tmp_path, "toy/lcm", train__lr=1e30, train__checkpoint_every=1)
    now = health(tmp_path / "run")[0].now
    assert ([finding.name for finding in now] == ["overflow"] and "It arises in the loss student/consistency itself: "
            "every module's output is finite" in now[0].says)
    assert "train.precision: fp32" in now[0].helps


def test_an_adapter_that_is_trained_and_not_sampled(tmp_path, tiny_teacher, monkeypatch):
    """As where peft's active adapter is another one outside training."""
    use = AdapterBank.use
    monkeypatch.setattr(AdapterBank, "use", lambda bank, name: use(bank, name if torch.is_grad_enabled() else None))
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    run = api.train({"method": "lcm", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "steps": 1,
                     "data": {"images": "shapes", "batch": 2},
                     "train": {"updates": 4, "lr": 1e-3, "log_every": 1, "doctor_every": 1}}, out=tmp_path / "run")
    assert "wrong adapter" in names(run) and "frozen student" not in names(run)


def test_training_is_the_same_to_the_bit_with_it_and_without(tmp_path):
    changes = {"train.updates": 3, "data.batch": 8, "train.doctor_every": 2, "settings.exit_embedding": True}
    runs = [api.train("toy/dmd2", out=tmp_path / then, **SHORT | changes | {"train.doctor": then})
            for then in ("warn", "off")]
    assert (runs[0] / "metrics.jsonl").read_bytes() == (runs[1] / "metrics.jsonl").read_bytes()
    one, two = (checkpoints.load(checkpoints.latest(run)) for run in runs)
    assert all(torch.equal(one[group][name], two[group][name]) for group in one for name in one[group])
    with pytest.raises(RequestError, match=r"holds no signals.jsonl.* --set train.doctor=warn"):
        health(runs[1])


def test_rollback_goes_on_from_before_the_sickness_with_smaller_rates(tmp_path):
    run = trained(tmp_path, "toy/lcm", train__lr=0.2, train__doctor="rollback", train__checkpoint_every=2,
                  train__updates=16)
    changed = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert changed[0] == {"step": 0, "entry": "train.lr", "was": 0.2, "now": 0.02}
    assert f"lr: {changed[-1]['now']}" in (run / "recipe.yaml").read_text() and len(changed) < 4
    said = (run / "train.log").read_text()
    assert "back to " in said and "rate too high" in said and list((run / "checkpoints").glob("sick-*"))
    assert [row["step"] for row in rows(run)] == list(range(0, 17, 2)) and checkpoints.latest(run).name == "step-000016"


def test_rollback_ends_where_smaller_rates_do_not_help(tmp_path):
    with pytest.raises(Stopped, match=r"stopped, as train.doctor asks: (rate too high|overflow): .* It has gone "
                       r"back often enough, each time to smaller rates"):
        trained(tmp_path, "toy/lcm", train__lr=2e4, train__doctor="rollback")


@pytest.mark.long
def test_the_command_says_what_ails_a_run(stepdistill, tmp_path):
    run = trained(tmp_path, "toy/lcm", train__lr=0.2)
    done = stepdistill("doctor", run)
    assert (done.returncode == 1 and "rate too high" in done.stdout and "What helps: lower train.lr from "
            "0.2 to 0.02" in done.stdout)
    assert (run / "signals.png").stat().st_size > 10_000
    assert stepdistill("doctor", tmp_path).returncode == 2


def test_a_record_holds_it_all(tmp_path):
    run = trained(tmp_path, "toy/lcm", train__updates=6)
    [one] = api.doctor(run)
    assert (one.plain["healthy"] and one.plain["now"] == [] and one.plain["step"] == 6
            and one.picture == run / "signals.png")
    assert json.loads(json.dumps(one.plain))["signals"]["diversity/student"] > 0
    assert "healthy: every signal is in its band" in one.words


def test_a_run_of_less_than_three_looks_has_no_doctor(tmp_path):
    run = trained(tmp_path, "toy/lcm", train__updates=5)
    with pytest.raises(RequestError, match="shorter than 3 looks"):
        api.doctor(run)


def test_the_doctor_asks_no_more_samples_at_a_time_than_a_micro_batch_holds(tmp_path, monkeypatch):
    """So it needs no memory that the training does not; its signals are the same."""
    asked, signals = [], []
    whole = Pieces.__call__
    monkeypatch.setattr(Pieces, "__call__", lambda self, x_t, t, cond=None: (asked.append(self.size),
                                                                             whole(self, x_t, t, cond))[1])
    for number, accumulate in enumerate((1, 4)):
        run = api.train("toy/lcm", out=tmp_path / str(number),
                        **SHORT | {"train.updates": 6, "train.accumulate": accumulate})
        signals.append(rows(run)[0])
    assert set(asked) == {16, 4}
    assert signals[0].keys() == signals[1].keys()
    for name in ("offset/student", "diversity/student", "drift/teacher"):
        assert signals[0][name] == pytest.approx(signals[1][name], abs=1e-4), name


def test_lines_that_no_doctor_wrote_are_left_out_and_a_run_without_a_look_is_not_called_healthy(tmp_path, caplog):
    run = trained(tmp_path, "toy/lcm", train__updates=6)
    file, sound = run / "signals.jsonl", rows(run)
    odd = ['{"step": 6, "moved/student": "nan"}', '{"step": 6, "not_finite": 3}', '{"step": "6"}', "{torn", "\x00"]
    file.write_text(file.read_text() + "\n".join(odd) + "\n")
    [one] = health(run)
    assert one.step == 6 and dict(one.signals) == sound[-1] and "5 of 9 lines are damaged, and left out" in caplog.text
    file.write_text("\n".join(odd) + "\n")
    with pytest.raises(RequestError, match="holds no signals.jsonl with a look in it"):
        health(run)
