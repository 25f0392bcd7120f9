"""TSCD beyond its identities: where steps land, what the discriminator is shown, stages, and what is refused."""
import pytest
import torch

from stepdistill.diffusion.flow_map import flow_map
from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Heads, Trained
from stepdistill.methods.consistency.tscd import TSCD, Settings
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.proofs.tscd import made
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check

from .players import spelled

F64 = torch.float64


def halved(problem: Problem) -> FunctionRole:
    return FunctionRole(problem.schedule, lambda x, t, cond: x / 2, "x0")


@pytest.mark.parametrize("nodes, steps", [(40, 8), (40, 4), (40, 1), (6, 2), (5, 5)])
def test_r_is_any_node_from_the_start_of_the_segment_to_s(nodes, steps):
    problem, count = Problem(0, "flow"), 30_000
    method = made(problem, halved(problem), steps, nodes=nodes)
    t, s, r = method.times(problem.step(count))
    start = ((t * steps - 1e-9).floor() / steps).clamp(min=0)
    assert len(t.unique()) == nodes and torch.allclose(t - s, torch.full_like(t, 1 / nodes))
    assert (r >= start).all() and (r <= s).all()
    noisiest = t == 1                                      # of a segment's end the most places to land on, all alike
    shares = torch.stack([(r[noisiest] - 1 + i / nodes).abs() < 1e-9
                          for i in range(1, nodes // steps + 1)]).double().mean(1)
    assert shares.sum().item() == pytest.approx(1) and (shares - steps / nodes).abs().max() < 0.12
    to_start = made(problem, halved(problem), steps, nodes=nodes, landing="start").times(problem.step(count))
    assert torch.equal(to_start[0], t) and torch.equal(to_start[1], s) and torch.equal(to_start[2], start)
    assert sorted(start.unique().tolist()) == pytest.approx(sorted(e.landing for e in method.sampler.evaluations),
                                                            abs=1e-6)


@pytest.mark.parametrize("noise", NAMES)
def test_where_r_is_s_the_target_is_the_teacher_s_step_whatever_the_student_says(noise):
    """Elsewhere the student goes on from there, held fixed."""
    problem = Problem(1, noise)
    leaf = torch.ones((), dtype=F64, requires_grad=True)
    student = FunctionRole(problem.schedule, lambda x, t, cond: leaf * x / 2, "x0")
    method, batch, step = made(problem, student), problem.batch(500), problem.step(500)
    loss = method.student_loss(batch, step)["consistency"]
    t, s, r = method.times(step)
    (_, inner, _), (x_t, asked, cond) = student.calls
    assert (torch.equal(inner, torch.where(s > r, s, t)) and torch.equal(asked, t) and cond is batch.cond
            and (s == r).any())
    guided = problem.guided_cond(500, problem.w)
    x_s = flow_map(problem.teacher, x_t, t, s, guided)
    onward = flow_map(halved(problem), x_s, torch.where(s > r, s, t), r)
    target = torch.where((s > r)[:, None], onward, x_s)
    x_r = flow_map(FunctionRole(problem.schedule, lambda x, t, cond: leaf * x / 2, "x0"), x_t, t, r)
    known = (x_r - target).square().mean()
    assert loss.item() == pytest.approx(known.item(), rel=1e-9)
    found, right = (torch.autograd.grad(each, leaf)[0].item() for each in (loss, known))
    assert found == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("noise", NAMES)
def test_real_and_fake_are_noised_alike_within_the_segment(noise):
    problem, shown = Problem(2, noise), []
    heads = lambda x, t, cond: shown.append((x, t, cond)) or x[:, :2]
    leaf = torch.ones((), dtype=F64, requires_grad=True)
    student = FunctionRole(problem.schedule, lambda x, t, cond: leaf * x / 2, "x0")
    method, batch, step = made(problem, student, discriminator=heads), problem.batch(2000), problem.step(2000)
    losses = method.student_loss(batch, step)
    assert losses.keys() == {"consistency", "gan"} and torch.autograd.grad(losses["gan"], leaf,
                                                                           retain_graph=True)[0] != 0
    assert not any(step.kept[name].requires_grad for name in ("real", "fake", "r"))
    method.critic_loss(batch, problem.step(2000, "critic+discriminator", kept=step.kept))
    (fake, t, cond), (real, first, _), (again, second, _) = shown
    r = method.times(step)[2]
    end = (r * 4 + 1e-9).floor() / 4 + 0.25
    assert torch.equal(first, second) and not torch.equal(first, t) and cond is batch.cond and fake.requires_grad
    for judged in (t, first):
        assert (judged >= r.clamp(min=0.001)).all() and (judged < end).all()
    kept = problem.schedule.alpha(first) / problem.schedule.alpha(r)
    assert torch.allclose(real - again, (step.kept["real"] - step.kept["fake"]) * kept[:, None], atol=1e-9)


def test_the_weights_are_of_the_two_distances():
    problem = Problem(3, "flow")
    heads, batch = lambda x, t, cond: x[:, :2], problem.batch(64)

    def losses(**settings):
        return made(problem, halved(problem), discriminator=heads, **settings).student_loss(batch, problem.step(64))
    plain, late = losses(mse_weight=1.0, gan_weight=1.0), losses(mse_weight=0.25, gan_weight=3.0)
    assert late["consistency"].item() == pytest.approx(0.25 * plain["consistency"].item())
    assert late["gan"].item() == pytest.approx(3 * plain["gan"].item())


def test_without_weight_there_is_no_game():
    needs = {"teacher": Frozen(), "student": Trained("teacher")}
    assert TSCD.needs(Settings(gan_weight=0.0), False) == needs
    assert TSCD.needs(Settings(), True) == needs | {"critic": Trained("teacher"), "discriminator": Heads("critic")}
    problem = Problem(4, "vp")
    assert [u.trains for u in made(problem, halved(problem)).updates()] == [("student",)]
    updates = made(problem, halved(problem), discriminator=lambda *_: None).updates()
    assert [(u.trains, u.shares) for u in updates] == [(("student",), 0), (("critic", "discriminator"), 1)]


def test_what_is_served():
    assert spelled(TSCD, Settings(), 8, "vp").scheduler == "DDIMScheduler"
    assert spelled(TSCD, Settings(), 4, "flow").call["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="found 3, and 2 or 4 would be right"):
        spelled(TSCD, Settings(nodes=30), 3, "vp")


@pytest.mark.parametrize("steps, nodes, says", [
    (3, 40, "3 steps want a multiple of 3 as nodes, and 40 nodes one of 1, 2, 4, 5, 8, 10, 20, 40 as steps"),
    (8, 50, "8 steps want a multiple of 8 as nodes, and 50 nodes one of 1, 2, 5, 10, 25, 50 as steps")])
def test_segments_that_do_not_divide_the_nodes_are_refused_before_a_teacher_is_loaded(steps, nodes, says, monkeypatch):
    monkeypatch.setattr("stepdistill.run.setup.load_teacher", None)
    recipe = Recipe.load("toy/tscd", {"stages": [{"steps": steps}], "settings.nodes": nodes})
    with pytest.raises(RequestError, match=f"steps is {steps}, which cannot be sampled: tscd cuts its nodes.*{says}"):
        check(recipe)


def test_stages_begin_with_the_student_before_and_are_taught_by_the_pipeline():
    stages = Recipe.load("toy/tscd", {"stages": [{"steps": [8, 4, 2, 1]}]}).stages
    assert [stage.steps for stage in stages] == [8, 4, 2, 1] and not any(stage.taught_by_previous for stage in stages)
    for stage in stages:
        check(stage)


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"landing": "end"}, {"gan_weight": -1.0}, {"mse_weight": -1.0},
                                   {"mse_weight": 0.0, "gan_weight": 0.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
