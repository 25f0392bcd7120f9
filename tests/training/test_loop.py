import json
import math
import os
import signal
import sys
from dataclasses import replace
from errno import ENOSPC

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from stepdistill.diffusion.draws import Step
from stepdistill.errors import RequestError
from stepdistill.methods.base import Update
from stepdistill.training import Stopped, TrainConfig, checkpoints, launched
from stepdistill.training.loop import Shared
from stepdistill.training.optimizers import learning_rate
from stepdistill.training.tracking import truncate

from ..unmagnified import unmagnified
from .toy import ToyMethod, toy_roles, trainer


def rows(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def weights(run_dir):
    return checkpoints.load(checkpoints.latest(run_dir))


def assert_same(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **(tolerance or {"rtol": 0, "atol": 0}))


class Crash(Exception):
    pass


def crash_at(step):
    def on_step(done):
        if done == step:
            raise Crash
    return on_step


# -- updates ---------------------------------------------------------------------------------------------------------

def test_order_of_updates(tmp_path):
    t = trainer(tmp_path, updates=3, accumulate=2)
    t.train()
    step = lambda i: ([(i, "critic", repeat, 0, 1, micro, 2) for repeat in (0, 1) for micro in (0, 1)] if i != 1
                      else []) + [
        (i, "student", 0, 0, 1, micro, 2) for micro in (0, 1)]
    assert t.stream.asked == step(0) + step(1) + step(2)
    assert t.roles.followed == ["critic", "critic", "student", "student", "critic", "critic", "student"]


def test_only_the_roles_of_an_update_move(tmp_path):
    t = trainer(tmp_path, weight_decay=0.5)
    for i, update in enumerate(t.updates):
        before = {name: [p.clone() for p in module.parameters()] for name, module in t.roles.items()}
        t.run(update, i, 0, Shared(update.name, 0, [{}]), {})
        moved = {name for name, module in t.roles.items() if any(
            not torch.equal(p, q) for p, q in zip(module.parameters(), before[name], strict=True))}
        assert moved == {"critic"} if update.name == "critic" else moved == {"student", "ema"}
        assert all(p.grad is None for module in t.roles.values() for p in module.parameters())


class Sharing(ToyMethod):
    """The student leaves what it saw; of the critic's three runs two share its batch."""

    def updates(self):
        self.seen = []
        return [Update(("student",), self.student_loss), Update(("critic",), self.critic_loss, repeat=3, shares=2)]

    def student_loss(self, batch, step):
        step.kept["x0"] = batch.x0
        return super().student_loss(batch, step)

    def critic_loss(self, batch, step):
        noise = step.normal("target", (1,))
        self.seen.append((step.repeat, "x0" in step.kept and torch.equal(step.kept["x0"], batch.x0), noise))
        return super().critic_loss(batch, step)


def test_updates_share_a_batch_and_what_was_kept_of_it(tmp_path):
    t = trainer(tmp_path, method=Sharing, accumulate=2)
    t.step(0)
    seen = t.updates[1].loss.__self__.seen
    assert [(repeat, shared) for repeat, shared, _ in seen] == [(0, True), (0, True), (1, True), (1, True),
                                                                (2, False), (2, False)]
    assert len({noise.flatten()[0].item() for *_, noise in seen}) == 6, "they share the batch, not the noise"
    assert [asked[1:3] for asked in t.stream.asked] == [("student", 0)] * 6 + [("critic", 2)] * 2


def test_an_update_is_adamw_on_clipped_gradients(tmp_path):
    t, mine = trainer(tmp_path, clip=0.01, weight_decay=0.1), toy_roles()
    t.run(t.updates[1], 0, 0, Shared("student", 0, [{}]), logs := {})
    batch = t.stream.batch(0, "student")
    losses = ToyMethod({}, mine, 1.0, 1).student_loss(batch, Step(5, 0, 0.0, "student", 0, batch.ids))
    sum(losses.values()).backward()
    norm = nn.utils.clip_grad_norm_(mine["student"].parameters(), 0.01)
    torch.optim.AdamW(mine["student"].parameters(), lr=1e-2, weight_decay=0.1).step()
    assert norm > 0.01 and logs["grad_norm/student"] == pytest.approx(norm.item(), rel=1e-6)
    assert logs["student/match"] == pytest.approx(losses["match"].item(), rel=1e-6)
    assert_same(dict(t.roles["student"].state_dict()), dict(mine["student"].state_dict()), rtol=0, atol=1e-6)


def test_accumulation_changes_nothing(tmp_path):
    with unmagnified():
        for accumulate in (1, 4):
            trainer(tmp_path / str(accumulate), accumulate=accumulate, lr=0.3).train()
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name in one:
        assert_same(one[name], four[name], rtol=1e-4, atol=1e-5)
    for a, b in zip(rows(tmp_path / "1"), rows(tmp_path / "4"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_dropout_is_a_function_of_the_moment(tmp_path):
    quiet = trainer(tmp_path / "a", dropout=0.5)
    state = torch.random.get_rng_state()
    quiet.train()
    assert torch.equal(torch.random.get_rng_state(), state)
    disturbed = trainer(tmp_path / "b", dropout=0.5, on_step=[lambda step: torch.randn(step)])
    disturbed.train()
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    trainer(tmp_path / "c", dropout=0.5, seed=6).train()
    assert (tmp_path / "a/metrics.jsonl").read_bytes() != (tmp_path / "c/metrics.jsonl").read_bytes()


class SameWeightsTwice(ToyMethod):
    """The student's own weights make the target first, without gradients: what LCM on an adapter does."""

    def updates(self):
        return [Update(("student",), self.student_loss)]

    def student_loss(self, batch, step):
        with torch.no_grad():
            target = self.roles["student"](batch.x0)
        x0 = self.roles["student"](batch.x0 + 1)
        assert x0.dtype == torch.bfloat16
        return {"match": (x0 - target).float().square().mean()}


def test_bf16_gradients_survive_an_earlier_pass_without_gradients(tmp_path):
    t = trainer(tmp_path, method=SameWeightsTwice, precision="bf16")
    t.run(t.updates[0], 0, 0, Shared("student", 0, [{}]), logs := {})
    assert logs["grad_norm/student"] > 0
    assert all(p.dtype == torch.float32 for p in t.roles["student"].parameters())


def test_no_host_synchronisation_outside_logging_steps(tmp_path, monkeypatch):
    calls = []
    for name in ("item", "__float__", "__bool__", "__int__", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    counts = []
    t = trainer(tmp_path, updates=8, log_every=8, on_step=[lambda step: counts.append(len(calls))])
    t.train()
    assert counts == [0] * 8


def test_an_update_of_an_unknown_role_is_refused(tmp_path):
    roles = toy_roles()
    del roles["critic"]
    with pytest.raises(ValueError, match=r"updates train \['critic'\]"):
        trainer(tmp_path, roles=roles)


# -- learning rate and configuration ---------------------------------------------------------------------------------

def test_learning_rate():
    warm = TrainConfig(updates=10, lr=2.0, warmup=4)
    assert [learning_rate(warm, i) for i in (0, 1, 3, 4, 9)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = TrainConfig(updates=10, lr=2.0, warmup=2, decay="cosine")
    assert learning_rate(cosine, 2) == 2.0 and learning_rate(cosine, 6) == pytest.approx(1.0)
    assert 0 < learning_rate(cosine, 9) < 0.1


def test_a_role_may_have_a_rate_of_its_own(tmp_path):
    config = TrainConfig(updates=10, lr=2.0, warmup=2, decay="cosine", rates={"critic": 8.0})
    for i in range(10):
        assert (learning_rate(config, i, "critic") == 4 * learning_rate(config, i, "student")
                == 4 * learning_rate(config, i))
    t = trainer(tmp_path, updates=2, rates={"critic": 0.5}, weight_decay=0.0)
    before = {name: [p.clone() for p in t.roles.parameters(name)] for name in ("student", "critic")}
    t.train()
    far = {name: max((p - q).abs().max().item() for p, q in zip(t.roles.parameters(name), old))
           for name, old in before.items()}
    assert 0.4 < far["critic"] < 1.1 and far["student"] < 0.021, "a step of AdamW is about its rate"
    assert [(row["lr"], row["lr/critic"]) for row in rows(tmp_path)] == [(1e-2, 0.5)] * 2
    with pytest.raises(ValueError, match=r"\['discriminator'\] have learning rates, but the updates train \['critic', "
                       r"'student'\]"):
        trainer(tmp_path, rates={"discriminator": 1.0})
    with pytest.raises(ValueError, match=r"train\.lr.*found.*-1"):
        TrainConfig(updates=1, rates={"critic": -1.0})


@pytest.mark.parametrize("wrong", [{"updates": 0}, {"accumulate": 0}, {"lr": 0.0}, {"clip": -1.0}, {"warmup": -1},
                                   {"weight_decay": -1.0}, {"checkpoint_every": 0}])
def test_configuration_is_checked(wrong):
    with pytest.raises(ValueError, match=rf"train\.{next(iter(wrong))}.*found"):
        TrainConfig(**{"updates": 1} | wrong)


def test_deepspeed_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RequestError, match="DEEPSPEED.*one optimizer"):
        launched()


# -- resuming --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config",
                         [{}, {"dropout": 0.3, "accumulate": 2}, {"precision": "bf16", "warmup": 5, "decay": "cosine"}])
def test_a_resumed_run_is_the_same_run(tmp_path, config):
    trainer(tmp_path / "whole", **config).train()
    with pytest.raises(Crash):
        trainer(tmp_path / "parts", [crash_at(6)], checkpoint_every=4, **config).train()
    assert [row["step"] for row in rows(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]        # two more than were saved
    resumed = trainer(tmp_path / "parts", checkpoint_every=4, **config)
    resumed.train(resume=True)
    assert resumed.stream.asked[0][0] == 4
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert sorted(whole) == ["optimizer-critic", "optimizer-student", "role-critic", "role-ema", "role-student"]
    for name in whole:
        assert_same(whole[name], parts[name])
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()
    timings = rows(tmp_path / "parts", "timings.jsonl")
    assert [row["step"] for row in timings] == [3, 4, 6, 7] and timings[-1]["seconds"] > timings[0]["seconds"]
    assert timings[0].keys() == {"step", "seconds", "images_per_s", "seconds_per_step", "memory_bytes"}


def test_resuming_a_finished_run_does_nothing(tmp_path):
    trainer(tmp_path).train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = trainer(tmp_path)
    again.train(resume=True)
    assert again.stream.asked == [] and (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    trainer(tmp_path, updates=1).train()
    with pytest.raises(RequestError, match="holds a run"):
        trainer(tmp_path).train()


def test_another_recipe_s_checkpoint_is_refused(tmp_path):
    trainer(tmp_path, updates=1).train()
    with pytest.raises(RequestError, match="role-critic.*Resume with the recipe"):
        trainer(tmp_path, method=SameWeightsTwice).train(resume=True)


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert truncate(path, 5) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert truncate(path, 2) == [{"step": 1}, {"step": 2}] and path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert truncate(tmp_path / "absent.jsonl", 2) == []


def test_damaged_lines_are_named_and_kept_beside(tmp_path, caplog):
    path, text = tmp_path / "metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3, "x": NaN}\n[]\n{"step": 5, "x": 1.5}\n'
    path.write_text(text)
    assert (truncate(path, 5) == [{"step": 1}, {"step": 5, "x": 1.5}] and path.read_text() == '{"step": 1}\n{"step": '
            '5, "x": 1.5}\n')
    assert (tmp_path / "damaged-1-metrics.jsonl").read_text() == text
    assert ("line 2: " in caplog.text and "line 3: it holds NaN" in caplog.text
            and "damaged-1-metrics.jsonl" in caplog.text)


DAMAGES = {
    "a flipped bit": lambda folder: (folder / "role-student.safetensors").write_bytes(
        (folder / "role-student.safetensors").read_bytes()[:-1] + b"!"),
    "a role less": lambda folder: saved_again(folder, lambda found: found.pop("role-critic")),
    "moments of another shape": lambda folder: saved_again(folder,
                                                           lambda found: found["optimizer-student"].update(
                                                               {"exp_avg.0": torch.zeros(3)})),
    "moments of nothing": lambda folder: saved_again(folder,
                                                     lambda found: found["optimizer-student"].update(
                                                         {"exp_avg.99": torch.zeros(3)})),
    "other keys": lambda folder: saved_again(folder,
                                             lambda found: found["optimizer-student"].update(
                                                 {"weight": torch.zeros(3)})),
    "half of the moments": lambda folder: saved_again(folder,
                                                      lambda found: found["optimizer-student"].pop("exp_avg_sq.1")),
}


def saved_again(folder, change):
    found = checkpoints.load(folder)
    change(found)
    checkpoints.save(folder.parents[1], checkpoints.step_of(folder), found)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_it_taken(tmp_path, damage, caplog):
    trainer(tmp_path / "whole", checkpoint_every=2).train()
    trainer(tmp_path / "run", checkpoint_every=2).train()
    DAMAGES[damage](checkpoints.latest(tmp_path / "run"))
    again = trainer(tmp_path / "run", checkpoint_every=2)
    again.train(resume=True)
    assert again.stream.asked[0][0] == 6 and (tmp_path / "run/checkpoints/damaged-1-step-000007").is_dir()
    assert "step-000007" in caplog.text and "step-000006 is taken" in caplog.text
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "run/metrics.jsonl").read_bytes()
    for name, tensors in weights(tmp_path / "whole").items():
        assert_same(tensors, weights(tmp_path / "run")[name])


def test_a_checkpoint_beyond_the_end_is_none_of_this_run(tmp_path):
    trainer(tmp_path, updates=9, checkpoint_every=6).train()
    again = trainer(tmp_path, updates=7)
    again.train(resume=True)
    assert again.stream.asked[0][0] == 6 and checkpoints.latest(tmp_path).name == "step-000007"


def test_the_last_checkpoints_are_kept(tmp_path):
    trainer(tmp_path, updates=7, checkpoint_every=2, keep=2).train()
    assert [folder.name for folder in checkpoints.found(tmp_path)] == ["step-000007", "step-000006"]


def test_what_was_owed_is_told_before_the_first_step(tmp_path):
    told = []
    with pytest.raises(Crash):
        trainer(tmp_path, [crash_at(4)], on_start=[told.append], checkpoint_every=2).train()
    trainer(tmp_path, [told.append], on_start=[told.append], checkpoint_every=2).train(resume=True)
    assert told == [0, 4, 5, 6, 7]


# -- ends before the end ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, name):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    press = lambda step: os.kill(os.getpid(), number) if step == 3 else None
    with pytest.raises(Stopped, match=r"interrupted after step 4 of 7.*step-000004 is kept: resume"):
        trainer(tmp_path / "parts", [press]).train()
    assert signal.getsignal(number) is handler
    trainer(tmp_path / "parts").train(resume=True)
    trainer(tmp_path / "whole").train()
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()
    for name, tensors in weights(tmp_path / "whole").items():
        assert_same(tensors, weights(tmp_path / "parts")[name])


def test_ctrl_c_twice_stops_at_once(tmp_path):
    def press(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped, match="interrupted within step 4.*step-000002 is kept"):
        trainer(tmp_path, [press], checkpoint_every=2).train()


class Explodes(ToyMethod):
    def student_loss(self, batch, step):
        losses = super().student_loss(batch, step)
        return losses | {"match": losses["match"] * (math.nan if step.index == 4 else 1)}


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    with pytest.raises(Stopped, match=r"student/match of step 5 is nan.*arises in the loss student/match "
                       r"itself.*step-000004 is kept.*"
                                      r"--set train.lr=0.005; --set train.clip=0.5\."):
        trainer(tmp_path, method=Explodes, checkpoint_every=2, log_every=20).train()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert all(tensor.isfinite().all() for tensors in weights(tmp_path).values() for tensor in tensors.values())


class Overflows(nn.Linear):
    """Of the first sample of step 5 it makes infinity."""

    def forward(self, x):
        return super().forward(x) * torch.where(x.detach().abs().max() > 50, math.inf, 1.0)


class Far(ToyMethod):
    def student_loss(self, batch, step):
        return super().student_loss(replace(batch, x0=batch.x0 * (100 if step.index == 4 else 1)), step)


def test_the_module_is_named_in_which_it_arose(tmp_path):
    roles = toy_roles()
    roles["student"], roles["ema"] = (nn.Sequential(nn.Sequential(nn.Linear(6, 6), Overflows(6, 6)), nn.Linear(6, 6))
                                      for _ in range(2))
    with pytest.raises(Stopped, match=r"It arises in Sequential\.0\.1 \(Overflows\), with the weights of step-000004"):
        trainer(tmp_path, method=Far, roles=roles, checkpoint_every=2, log_every=20).train()


def test_data_that_are_not_finite_are_named(tmp_path):
    t = trainer(tmp_path, log_every=20)
    batch = t.stream.batch

    def damaged(step, *rest):
        found = batch(step, *rest)
        found.x0[5] = math.nan if step == 2 else 0.0
        return found

    t.stream.batch = damaged
    with pytest.raises(Stopped, match=r"of step 3 is nan.*The data of samples 21 are not finite. No checkpoint "
                       r"was written yet"):
        t.train()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    t = trainer(tmp_path, method=SameWeightsTwice32, checkpoint_every=2, lr=1e-2, log_every=20)
    follow = t.roles.follow

    def driven(role, step):
        follow(role, step)
        # within the fourth step, whose losses and gradients are finite
        if t.done == 3:
            t.roles["student"][0].weight.data[0, 0] = math.inf
    t.roles.follow = driven
    with pytest.raises(Stopped, match=r"0\.weight of the student is not finite after step 4, which is not saved. "
                       r".*step-000002 is kept"):
        t.train()
    assert [folder.name for folder in checkpoints.found(tmp_path)] == ["step-000002"]


class SameWeightsTwice32(ToyMethod):
    def updates(self):
        return [Update(("student",), self.student_loss)]


@pytest.mark.parametrize("error", [OSError(ENOSPC, "No space left on device"),
                                   SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, monkeypatch, error):
    real = checkpoints.save_file

    def full(tensors, path):
        if "000004" in str(path) and "student" in path.name:
            path.write_bytes(b"half")
            raise error
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(Stopped, match="step 4 could not be written.*No space left on device.*step-000002 is kept; "
                       "make room"):
        trainer(tmp_path, checkpoint_every=2).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.setattr(checkpoints, "save_file", real)
    trainer(tmp_path, checkpoint_every=2).train(resume=True)
    assert checkpoints.latest(tmp_path).name == "step-000007"


def test_a_log_that_cannot_be_written_stops_with_a_message(tmp_path):
    def fill(step):
        if step == 4:
            raise OSError(ENOSPC, "No space left on device")
    with pytest.raises(Stopped, match="stopped after step 4.*No space left.*step-000004 is kept"):
        trainer(tmp_path, [fill], checkpoint_every=2).train()
