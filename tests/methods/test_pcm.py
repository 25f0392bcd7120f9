"""PCM beyond its identities: phases whose edges are nodes, what the heads are shown, and what is refused."""
import pytest
import torch

from stepdistill.diffusion.triples import grid
from stepdistill.methods.base import Frozen, Heads, Trained
from stepdistill.methods.consistency.pcm import PCM, Settings
from stepdistill.proofs.pcm import made
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem

from .players import spelled

F64 = torch.float64


def halved(problem: Problem) -> FunctionRole:
    return FunctionRole(problem.schedule, lambda x, t, cond: x / 2, "x0")


@pytest.mark.parametrize("nodes, steps", [(40, 4), (50, 4), (9, 2), (5, 5), (30, 3)])
def test_no_step_of_the_teacher_leaves_its_phase(nodes, steps):
    """50 nodes have no 0.75: there the edge is one node more."""
    problem = Problem(0, "flow")
    method = made(problem, halved(problem), steps, nodes=nodes)
    t, s, r = method.times(problem.step(20_000))
    assert (r <= s).all() and (s < t).all() and (t - s <= 1 / nodes + 1e-12).all()
    assert torch.equal(r, ((t * steps - 1e-9).floor() / steps).clamp(min=0))
    extra = sum(j * nodes % steps != 0 for j in range(steps))
    assert len(t.unique()) == nodes + extra and set(grid(steps)[1:].tolist()) <= set(t.unique().tolist())
    assert sorted(r.unique().tolist()) == pytest.approx(sorted(e.landing for e in method.sampler.evaluations), abs=1e-6)


@pytest.mark.parametrize("noise", NAMES)
def test_the_heads_are_shown_the_landings_noised_within_their_phase(noise):
    problem, shown = Problem(1, noise), []
    heads = lambda x, t, cond: shown.append((x, t, cond)) or [x[:, :2]]
    student = FunctionRole(problem.schedule, lambda x, t, cond: leaf * x / 2, "x0")
    leaf = torch.ones((), dtype=F64, requires_grad=True)
    method, batch, step = made(problem, student, discriminator=heads), problem.batch(4000), problem.step(4000)
    losses = method.student_loss(batch, step)
    assert losses.keys() == {"consistency", "gan"} and torch.autograd.grad(losses["gan"], leaf,
                                                                           retain_graph=True)[0] != 0
    assert not any(step.kept[name].requires_grad for name in ("real", "fake", "r"))
    method.critic_loss(batch, problem.step(4000, "discriminator", kept=step.kept))
    (fake, t, cond), (real, first, _), (again, second, _) = shown
    r = method.times(step)[2]
    assert torch.equal(first, second) and not torch.equal(first, t) and cond is batch.cond and fake.requires_grad
    for judged in (t, first):
        assert (judged >= r.clamp(min=0.001)).all() and (judged < r + 0.25).all()
        assert torch.allclose(judged * 1000, (judged * 1000).round(), atol=1e-9)
    kept = problem.schedule.alpha(first) / problem.schedule.alpha(r)          # real and fake under one noise
    apart = (step.kept["real"] - step.kept["fake"]) * kept[:, None]
    assert torch.allclose(real - again, apart, atol=1e-9)


def test_a_position_within_its_margin_is_not_outvoted():
    """Logits 3 and -1 at two positions have a mean beyond its margin; of themselves one is 2 short as real, one 4 as
    fake."""
    problem = Problem(5, "flow")
    heads = lambda x, t, cond: [torch.tensor([3.0, -1.0], dtype=F64).expand(len(x), 2)]
    method, step = made(problem, halved(problem), discriminator=heads), problem.step(16)
    assert method.student_loss(problem.batch(16), step)["gan"].item() == pytest.approx(0.1 * (0 + 2) / 2)
    critic = problem.step(16, "discriminator", kept=step.kept)
    found = method.critic_loss(problem.batch(16), critic)["discriminator"].item()
    assert found == pytest.approx((0 + 2) / 2 + (4 + 0) / 2)


def test_at_the_start_of_a_phase_the_teacher_s_step_is_the_target_whatever_the_student_says():
    problem = Problem(2, "flow")
    student = FunctionRole(problem.schedule,
                           lambda x, t, cond: problem.teacher(x, t, problem.guided_cond(len(t), problem.w)).x0, "x0")
    method = made(problem, student, 40)
    assert method.student_loss(problem.batch(200), problem.step(200))["consistency"] < 1e-18


def test_without_weight_there_are_no_heads():
    needs = {"teacher": Frozen(), "student": Trained("teacher")}
    assert PCM.needs(Settings(gan_weight=0.0), False) == needs
    assert PCM.needs(Settings(), True) == needs | {"discriminator": Heads("teacher", kind="tokens")}
    problem = Problem(3, "vp")
    assert [u.trains for u in made(problem, halved(problem)).updates()] == [("student",)]
    updates = made(problem, halved(problem), discriminator=lambda *_: None).updates()
    assert [(u.trains, u.shares) for u in updates] == [(("student",), 0), (("discriminator",), 1)]


def test_what_is_served():
    assert spelled(PCM, Settings(), 4, "vp").scheduler == "DDIMScheduler"
    assert spelled(PCM, Settings(), 4, "flow").call["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    for steps in (0, 51):
        with pytest.raises(ValueError, match=f"1 to 50 steps; found {steps}"):
            spelled(PCM, Settings(), steps, "flow")
    with pytest.raises(ValueError, match="found 3, and 2 or 4 would be right"):
        spelled(PCM, Settings(), 3, "vp")


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"loss": "l1"}, {"huber_c": 0.0}, {"gan_weight": -1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
