"""SANA-Sprint beyond its identities: what the student reads, what the heads are shown, and what is refused."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepdistill.diffusion.continuous import start
from stepdistill.methods.base import Frozen, Heads, Trained
from stepdistill.methods.hybrid.sana_sprint import SanaSprint, Settings
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.proofs.sana_sprint import made

from .players import spelled


def halved(problem: Problem) -> FunctionRole:
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    role = FunctionRole(problem.schedule, lambda x, t, cond: leaf * x / 2, "x0")
    role.leaf = leaf
    return role


def blind(x, s, cond):
    return [0 * x[:, :1]]


@pytest.mark.parametrize("noise", NAMES)
def test_the_student_reads_the_scale_at_which_the_teacher_is_guided(noise):
    problem = Problem(0, noise)
    student, batch, step = halved(problem), problem.batch(64), problem.step(64)
    made(problem, student, blind, derivative="difference").student_loss(batch, step)
    scales = 1.5 + 2.5 * step.uniform("guidance")
    assert len(student.calls) == 4 and all(torch.equal(cond.w, scales) for *_, cond in student.calls)
    student.calls.clear()
    made(problem, student, blind, derivative="difference", guidance_embedding=False).student_loss(batch, step)
    assert all(cond.w is None for *_, cond in student.calls)


@pytest.mark.parametrize("noise", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_what_is_judged_begins_where_sampling_does(noise, share):
    problem = Problem(1, noise)
    student, step = halved(problem), problem.step(4000)
    made(problem, student, blind, derivative="difference", noise_share=share, std=0.1,
         mean=0.0).student_loss(problem.batch(4000), step)
    first = (student.calls[-1][1] - start(problem.schedule)).abs() < 1e-9
    assert first.double().mean().item() == pytest.approx(share, abs=0.03)


def test_the_heads_judge_noised_data_and_the_noised_sample_each_at_its_own_level():
    problem, shown = Problem(2, "flow"), []
    student = halved(problem)
    method = made(problem, student, lambda x, s, cond: shown.append((x, s, cond)) or [x[:, :1]],
                  derivative="difference", gan_weight=2.0)
    batch, step = problem.batch(200), problem.step(200)
    losses = method.student_loss(batch, step)
    assert torch.autograd.grad(losses["gan"], student.leaf)[0] != 0 and not step.kept["sample"].requires_grad
    moment = problem.step(200, "discriminator", kept=step.kept)
    found = method.critic_loss(batch, moment)
    (fooled, _, cond), (real, s, _), (fake, u, _) = shown
    assert fooled.requires_grad and cond is batch.cond and not torch.equal(s, u)
    for seen, clean, level, name in ((real, batch.x0, s, "real"), (fake, step.kept["sample"], u, "fake")):
        assert torch.allclose(seen, problem.schedule.add_noise(clean, moment.normal(f"{name} noise", batch.shape),
                                                               level))
        log_ratio = torch.log(level / (1 - level))
        assert (log_ratio.mean().item() == pytest.approx(0.1, abs=0.3)
                and log_ratio.std().item() == pytest.approx(1.0, abs=0.2))
    assert losses["gan"].item() == pytest.approx(-2 * fooled[:, :1].mean().item())
    known = (1 - real[:, :1]).clamp(min=0).mean() + (1 + fake[:, :1]).clamp(min=0).mean()
    assert found["discriminator"].item() == pytest.approx(known.item())


def test_who_is_needed_and_in_which_order():
    heads = Heads("teacher", kind="tokens")
    assert SanaSprint.needs(Settings(), False) == {"teacher": Frozen(), "student": Trained("teacher", ("w",)),
                                                   "discriminator": heads}
    assert SanaSprint.needs(Settings(guidance_embedding=False), True)["student"] == Trained("teacher")
    problem = Problem(3, "vp")
    updates = made(problem, halved(problem), blind).updates()
    assert [(u.trains, u.shares) for u in updates] == [(("student",), 0), (("discriminator",), 1)]


def test_it_is_sampled_as_scm_is_at_the_middle_of_its_scales():
    flow = spelled(SanaSprint, Settings(), 2, "flow", (2.0, 5.0))
    assert flow.call["sigmas"] == pytest.approx([0.999, 2 / 3]) and flow.call["guidance_scale"] == 3.5
    vp = spelled(SanaSprint, Settings(), 2, "vp", (2.0, 5.0))
    assert vp.scheduler == "LCMScheduler" and vp.call["guidance_scale"] == 3.5
    assert replace(Settings(), guidance_embedding=False) != Settings()
    assert spelled(SanaSprint, Settings(guidance_embedding=False), 2, "vp", (2.0, 5.0)).call["guidance_scale"] == 1.0


@pytest.mark.parametrize("wrong, message", [
    ({"std": 0.0}, "std"), ({"warmup": 1.5}, "share of the training"), ({"derivative": "jvp"}, "found 'jvp'"),
    ({"gan_weight": -1.0}, "gan_weight"),
    ({"noise_share": 1.2}, "noise_share"), ({"judged_std": 0.0}, "judged_std")])
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
