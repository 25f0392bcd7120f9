"""SCott beyond its identities: how far the teacher goes and on which noise, what the heads are shown, and what is
refused."""
from __future__ import annotations

import pytest
import torch

from stepdistill.methods.base import Follows, Frozen, Heads, Inference, Trained
from stepdistill.methods.consistency.scott import SCott, Settings
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.proofs.scott import made

from .players import spelled

F64 = torch.float64


def halved(problem: Problem) -> FunctionRole:
    return FunctionRole(problem.schedule, lambda x, t, cond: x / 2, "x0")


@pytest.mark.parametrize("noise", NAMES)
@pytest.mark.parametrize("nodes, skip, substeps", [(1000, 24, 3), (50, 1, 2), (10, 10, 1)])
def test_the_teacher_is_asked_at_even_times_from_t_down_to_s_and_the_target_there(noise, nodes, skip, substeps):
    problem = Problem(0, noise)
    teacher, target = halved(problem), halved(problem)
    method = made(problem, halved(problem), target, nodes=nodes, skip=skip, substeps=substeps)
    method.teacher = teacher
    method.guidance = 1.0
    method.student_loss(problem.batch(200), step := problem.step(200))
    t, s = method.times(step)
    assert torch.allclose(t - s, t.clamp(max=skip / nodes)) and torch.equal((t * nodes).round() / nodes, t)
    assert len(teacher.calls) == substeps and len(target.calls) == 1
    for i, (_, asked, _) in enumerate(teacher.calls):            # of discrete times none below the first, 1 / 1000
        assert torch.allclose(asked, (t + (s - t) * i / substeps).clamp(min=1e-3 if noise == "vp" else 0))
    assert torch.equal(target.calls[0][1], torch.where(s > 0, s, t))


def test_every_sub_step_has_noise_of_its_own_as_large_as_eta_says():
    """Of a teacher that says 0, eps is x / sigma: one step from t = 1 to 1 / 2 leaves x sqrt(1/4 - f^2) + f z on a
    flow, f = eta / 2."""
    problem = Problem(1, "flow")
    target = halved(problem)
    method = made(problem, halved(problem), target, nodes=2, substeps=1, eta=0.6)
    method.teacher, method.guidance = FunctionRole(problem.schedule, lambda x, t, cond: 0 * x, "x0"), 1.0
    method.times = lambda step: (torch.ones(4000, dtype=F64), torch.full((4000,), 0.5, dtype=F64))
    batch, step = problem.batch(4000), problem.step(4000)
    method.student_loss(batch, step)
    noise = step.normal("noise", batch.shape).double()
    left = target.calls[0][0] - noise * (0.25 - 0.3**2) ** 0.5
    assert left.std().item() == pytest.approx(0.3, rel=0.02) and abs((left * noise).mean().item()) < 0.02
    found = torch.cat([step.normal(f"fresh {i}", batch.shape).flatten()[None] for i in range(3)])
    assert (found.cov() - torch.eye(3)).abs().max() < 0.05


def test_at_the_data_the_target_is_the_teacher_s_end_whatever_it_says():
    problem = Problem(2, "flow")
    wild = FunctionRole(problem.schedule, lambda x, t, cond: 1e3 * x, "x0")
    whole = made(problem, halved(problem), wild, nodes=1, substeps=1, eta=0.0)
    batch, step = problem.batch(200), problem.step(200)
    noise = step.normal("noise", batch.shape).double()
    known = problem.teacher(noise, torch.ones(200, dtype=F64), problem.guided_cond(200, problem.w)).x0
    assert (whole.student_loss(batch, step)["consistency"].item()
            == pytest.approx((noise / 2 - known).square().mean().item(), rel=1e-9))


@pytest.mark.parametrize("noise", NAMES)
def test_the_heads_see_the_data_and_the_student_s_x0_told_its_time(noise):
    problem, shown = Problem(3, noise), []
    leaf = torch.ones((), dtype=F64, requires_grad=True)
    student = FunctionRole(problem.schedule, lambda x, t, cond: leaf * x / 2, "x0")
    method = made(problem, student, halved(problem), lambda x, t, cond: shown.append((x, t, cond)) or [x[:, :2]])
    batch, step = problem.batch(100), problem.step(100)
    losses = method.student_loss(batch, step)
    assert losses.keys() == {"consistency", "gan"} and torch.autograd.grad(losses["gan"], leaf)[0] != 0
    assert not step.kept["fake"].requires_grad
    method.critic_loss(batch, problem.step(100, "critic+discriminator", kept=step.kept))
    (x, t, cond), (real, _, _), (fake, _, _) = shown
    assert x.requires_grad and torch.equal(fake, x.detach()) and torch.equal(real, batch.x0) and cond is batch.cond
    assert all(torch.equal(u, method.times(step)[0]) for _, u, _ in shown)


def test_a_position_within_its_margin_is_not_outvoted():
    """Logits 3 and -1 at two positions have a mean beyond its margin; of themselves one is 2 short as real, one 4 as
    fake."""
    problem = Problem(6, "flow")
    heads = lambda x, t, cond: [torch.tensor([3.0, -1.0], dtype=F64).expand(len(x), 2)]
    method, step = made(problem, halved(problem), discriminator=heads), problem.step(16)
    assert method.student_loss(problem.batch(16), step)["gan"].item() == pytest.approx(-0.5 * (3 - 1) / 2)
    critic = problem.step(16, "critic+discriminator", kept=step.kept)
    found = method.critic_loss(problem.batch(16), critic)["discriminator"].item()
    assert found == pytest.approx((0 + 2) / 2 + (4 + 0) / 2)


def test_without_weight_there_are_no_heads():
    needs = {"teacher": Frozen(), "student": Trained("teacher"), "target": Follows("student", 0.95)}
    assert SCott.needs(Settings(gan_weight=0.0), False) == needs
    assert SCott.needs(Settings(), True) == needs | {"critic": Trained("teacher"),
                                                     "discriminator": Heads("critic", kind="tokens")}
    assert SCott.needs(Settings(guidance_embedding=True), True)["student"] == Trained("teacher", ("w",))
    problem = Problem(4, "vp")
    assert [u.trains for u in made(problem, halved(problem)).updates()] == [("student",)]
    updates = made(problem, halved(problem), discriminator=lambda *_: None).updates()
    assert [(u.trains, u.shares) for u in updates] == [(("student",), 0), (("critic", "discriminator"), 1)]


def test_a_shift_moves_the_nodes_and_the_sampler_s_times():
    problem = Problem(5, "flow")
    t, s = made(problem, halved(problem), nodes=4, shift=3.0).times(problem.step(500))
    assert (sorted(t.unique().tolist()) == pytest.approx([0.5, 0.75, 0.9, 1.0])
            and s.unique().tolist() == pytest.approx([0, 0.5, 0.75, 0.9]))
    assert SCott.inference(Settings(shift=3.0), 4, problem.schedule) == Inference(4, noise=1.0, nodes=1000, shift=3.0)
    assert spelled(SCott, Settings(shift=3.0), 4, "flow").config["shift"] == 3.0


def test_what_is_served():
    found = spelled(SCott, Settings(), 4, "vp")
    assert found.scheduler == "LCMScheduler" and found.config["original_inference_steps"] == 1000
    assert spelled(SCott, Settings(), 4, "flow").call["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="serves 1 to 20 steps; found 21"):
        spelled(SCott, Settings(nodes=20, skip=1), 21, "flow")
    for wrong in ({"nodes": 30, "skip": 1}, {"shift": 3.0}):
        with pytest.raises(ValueError, match="nodes that divide 1000, its times, and no shift"):
            spelled(SCott, Settings(**wrong), 4, "vp")


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"skip": 1001}, {"substeps": 0}, {"eta": 1.1}, {"eta": -0.1},
                                   {"loss": "l1"}, {"huber_c": 0.0},
                                   {"gan_weight": -1.0}, {"target_decay": 1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
