from __future__ import annotations

import pytest
import torch

from stepdistill.errors import RequestError
from stepdistill.methods.adversarial.add import ADD, Settings
from stepdistill.methods.adversarial.ladd import LADD
from stepdistill.proofs.problem import FunctionRole, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.checks import configured
from stepdistill.run.plan import plan
from stepdistill.run.setup import setup

from .players import spelled


def made(problem, student=None, w=1.0, decode=lambda x: x, **settings) -> ADD:
    heads = lambda maps, cond: [m.sum(1, keepdim=True) for m in maps]
    roles = {"teacher": problem.teacher, "student": student or problem.affine(), "decode": decode,
             "features": lambda pixels: [pixels, pixels**2], "discriminator": heads}
    return ADD(Settings(**settings), roles, w, problem.sampler(ADD.inference(Settings(), 4, problem.schedule)))


@pytest.mark.parametrize("settings", [{"nodes": 0}, {"critic_steps": 0}, {"distillation_weight": -1}, {"r1_weight": -1},
                                      {"noise": -1},
                                      {"distance": "lpips"}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="found"):
        Settings(**settings)


def test_it_samples_at_the_times_that_it_trains_at():
    problem = Problem(0, "vp")
    for steps in (1, 2, 4):
        assert {round(4 * t, 9)
                for t in problem.sampler(ADD.inference(Settings(), steps, problem.schedule)).times.tolist()} <= {1, 2,
                                                                                                                 3, 4}
    with pytest.raises(ValueError, match="divide 4; found 3 steps"):
        spelled(ADD, Settings(), 3, "vp")


def test_the_student_is_asked_at_four_times_and_of_noise_alone_at_the_last():
    problem = Problem(0, "vp")
    student = FunctionRole(problem.schedule, lambda x_t, t, cond: x_t)
    step = problem.step(100)
    made(problem, student).student_loss(problem.batch(100), step)
    (x_t, t, _), = student.calls
    assert (set(t.tolist()) == {0.25, 0.5, 0.75, 1.0}
            and torch.equal(x_t[t == 1], step.normal("start", (problem.dim,)).double()[t == 1]))


@pytest.mark.parametrize("distance, decoded", [("pixels", [True, False]), ("latents", [True])])
def test_only_the_student_s_own_picture_takes_gradients(distance, decoded):
    """Not the teacher, not the picture of what it says, and not where the student's sample is noised again."""
    problem, passed = Problem(0, "vp"), []
    batch, student, step = problem.batch(8), problem.affine(), problem.step(8)
    problem.teacher.covariance.requires_grad_()
    method = made(problem, student, decode=lambda x: passed.append(x.requires_grad) or x, distance=distance, w=3.0)
    losses = method.student_loss(batch, step)
    assert passed == decoded and not step.kept["pixels"].requires_grad
    for loss in losses.values():
        grads = torch.autograd.grad(loss, (student.m, student.S, problem.teacher.covariance), retain_graph=True,
                                    allow_unused=True)
        assert grads[0].any() and grads[1].any() and grads[2] is None


def test_the_heads_see_the_student_s_picture_and_leave_the_student_alone():
    problem = Problem(0, "flow")
    method, batch, step = made(problem, critic_steps=2), problem.batch(8), problem.step(8)
    assert [(u.trains, u.repeat, u.shares) for u in method.updates()] == [(("student",), 1, 0),
                                                                          (("discriminator",), 2, 2)]
    method.student_loss(batch, step)
    losses = method.critic_loss(batch, problem.step(8, "discriminator", kept=step.kept))
    assert not torch.autograd.grad(losses["discriminator"], method.student.m, allow_unused=True)[0]
    x0, fake = batch.x0, step.kept["pixels"]
    known = (torch.relu(1 - x0.sum(1)) + torch.relu(1 + fake.sum(1)) + torch.relu(1 - (x0**2).sum(1))
             + torch.relu(1 + (fake**2).sum(1)))
    torch.testing.assert_close(losses["discriminator"], known.mean())
    torch.testing.assert_close(losses["r1"], 1e-5 * torch.tensor(2.0 * problem.dim, dtype=torch.float64))


def test_every_position_has_a_margin_of_its_own_and_r1_is_of_their_mean():
    """One position that is wrong teaches on beside three that are right beyond the margin, where their mean would
    not."""
    problem = Problem(0, "vp")
    method, batch, step = (made(problem, decode=lambda x: x[:, :1] * 0 + 1, r1_weight=1.0), problem.batch(2),
                           problem.step(2))
    scale = torch.tensor([5.0, 5.0, 5.0, -1.0], dtype=torch.float64, requires_grad=True)
    method.features, method.discriminator = lambda pixels: [pixels], lambda maps, cond: [maps[0] * scale]
    method.student_loss(batch, step)
    losses = method.critic_loss(batch, problem.step(2, "discriminator", kept=step.kept))
    # real: 0, 0, 0, 2 below the margin; fake: 6, 6, 6, 0
    torch.testing.assert_close(losses["discriminator"], torch.tensor(2 / 4 + 18 / 4, dtype=torch.float64))
    slope, = torch.autograd.grad(losses["discriminator"], scale, retain_graph=True)
    assert slope.tolist() == [0.25, 0.25, 0.25, -0.25]
    torch.testing.assert_close(losses["r1"], torch.tensor((14 / 4) ** 2, dtype=torch.float64))


def test_all_that_the_heads_see_may_be_noised_and_what_is_kept_is_not():
    problem, seen = Problem(0, "vp"), []
    student = problem.affine()
    method, clean = made(problem, student, noise=0.5), made(problem, student)
    method.features = lambda pixels: [seen.append(pixels) or pixels]
    batch, step = problem.batch(4000), problem.step(4000)
    method.student_loss(batch, step)
    method.critic_loss(batch, problem.step(4000, "discriminator", kept=step.kept))
    clean.student_loss(batch, other := problem.step(4000))
    assert torch.equal(step.kept["pixels"], other.kept["pixels"])
    noises = [found - known for found, known in zip(seen, (step.kept["pixels"], batch.x0, step.kept["pixels"]),
                                                    strict=True)]
    # the square of a deviation that is uniform up to 0.5 is 0.25 / 3 on average
    for noise in noises:
        assert noise.square().mean().item() == pytest.approx(0.25 / 3, rel=0.1)
    assert not torch.equal(noises[0], noises[2])
    assert abs(torch.corrcoef(torch.stack([noise.flatten() for noise in noises])) - torch.eye(3)).max() < 0.1


def test_without_its_weight_the_teacher_is_not_asked():
    problem = Problem(0, "vp")
    method = made(problem, distillation_weight=0.0)
    method.teacher = None
    assert set(method.student_loss(problem.batch(4), problem.step(4))) == {"gan"}


# -- in a recipe -------------------------------------------------------------------------------------------------------

@pytest.fixture
def recipe(tiny_teacher):
    entries = {"method": "add", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
               "guidance": 2.0, "steps": 1,
            "discriminator": {"network": "assets/shapes-clip", "features": ["embeddings", "layers.2"]},
            "data": {"images": "shapes", "batch": 2}, "train": {"updates": 1}}
    return lambda **changes: Recipe.load(entries, changes)


def test_a_plan_counts_the_roles_that_are_made(recipe):
    found, roles = plan(recipe()), setup(recipe(), torch.device("cpu")).roles
    count = lambda parameters: sum(p.numel() for p in parameters)
    assert found["roles"]["discriminator"]["parameters"] == count(roles.parameters("discriminator"))
    assert found["roles"]["features"] == {"parameters": (n := count(roles["features"].parameters())), "trained": 0,
                                          "bytes": 4 * n}
    assert "decode" not in found["roles"] and found["passes"] == {"forward": 3, "backward": 1, "batch": 2, "updates": 1}


def test_a_recipe_keeps_the_network_s_name_and_refuses_one_that_nobody_reads(recipe):
    resolved = recipe().resolved()
    assert resolved["discriminator"]["network"] == "assets/shapes-clip" and Recipe.load(resolved).resolved() == resolved
    needs = LADD.needs(LADD.Settings(), full=False)
    with pytest.raises(RequestError, match="discriminator.network is assets/shapes-clip, but the discriminator "
                                           "of ladd reads the features of its teacher, not of pictures"):
        configured(recipe(method="ladd"), needs)
