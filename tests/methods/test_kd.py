from dataclasses import replace

import pytest
import torch

from stepdistill.diffusion.contracts import Pairs
from stepdistill.diffusion.prediction import Prediction
from stepdistill.errors import RequestError
from stepdistill.methods.trajectory.kd import KD, Settings
from stepdistill.proofs.kd import made, traveller
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.setup import setup

from .players import spelled


@pytest.mark.parametrize("noise", NAMES)
def test_the_student_is_asked_at_the_nodes_and_nowhere_else(noise):
    """Of 8 kept states a student of 4 steps meets every second; each leg is drawn as often as another."""
    problem = Problem(3, noise)
    batch, student = problem.paired(400, nodes=8), traveller(problem, 4, 1.0)
    assert made(problem, student, 4).loss(batch, problem.step(400))["regression"] < 1e-20
    ((x_t, t, cond),) = student.calls
    assert sorted(t.unique().tolist()) == [0.25, 0.5, 0.75, 1.0] and all((t == each).sum() > 60 for each in t.unique())
    assert (torch.equal(x_t[t == 1], batch.pairs.noise[t == 1])
            and torch.equal(x_t[t == 0.5], batch.pairs.nodes[t == 0.5, 3]))
    assert cond is batch.cond


def test_one_step_is_the_paper_s_regression_of_the_picture():
    problem, wrong = Problem(0, "vp"), 0.25
    batch = problem.paired(16)
    student = FunctionRole(problem.schedule, lambda x, t, cond: batch.x0 + wrong, "x0")
    sampler = made(problem, student, 1).sampler
    for loss, known in (("squared", wrong**2), ("absolute", wrong)):
        method = KD(Settings(loss=loss), {"student": student}, 1.0, sampler)
        assert method.loss(batch, problem.step(16))["regression"].item() == pytest.approx(known, rel=1e-6)


def test_on_a_flow_the_loss_is_that_of_the_velocity_over_the_steps_squared():
    problem, wrong = Problem(1, "flow"), 0.5
    batch, right = problem.paired(64, nodes=4), traveller(problem, 4, 1.0)

    class Off:
        schedule = problem.schedule

        def __call__(self, x_t, t, cond):
            return Prediction(right(x_t, t, cond).velocity + wrong, x_t, t, problem.schedule, "velocity")

    assert (made(problem, Off(), 4).loss(batch, problem.step(64))["regression"].item()
            == pytest.approx(wrong**2 / 16, rel=1e-9))


def test_pairs_that_lack_the_nodes_are_refused():
    problem = Problem(0, "flow")
    method = made(problem, traveller(problem, 4, 1.0), 4)
    for nodes in (1, 2, 6):
        with pytest.raises(RequestError, match=f"pairs keep {nodes}: data.pairs.nodes should be a multiple of 4"):
            method.loss(problem.paired(8, nodes=nodes), problem.step(8))


def test_gradients_reach_the_student_alone():
    problem = Problem(0, "vp")
    batch, student = problem.paired(8), problem.affine()
    pairs = Pairs(batch.pairs.noise.requires_grad_(), batch.pairs.nodes, batch.pairs.times)
    made(problem, student, 1).loss(replace(batch, pairs=pairs), problem.step(8))["regression"].backward()
    assert student.m.grad.norm() > 0 and student.S.grad.norm() > 0 and not batch.pairs.nodes.requires_grad


def test_a_recipe_without_the_nodes_is_refused_before_a_pair_is_made(tiny_teacher):
    table = {"method": "kd", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "steps": 4,
             "train": {"updates": 1},
             "data": {"pairs": {"prompts": ["a red ring"], "solver": "ddim", "steps": 4, "nodes": 2}, "count": 4,
                      "batch": 4}}
    with pytest.raises(RequestError, match="data.pairs.nodes is 2; a student of 4 steps lands on 4 evenly "
                       "spaced states"):
        setup(Recipe.load(table), torch.device("cpu"))
    table["data"]["pairs"]["nodes"] = 4
    assert setup(Recipe.load(table), torch.device("cpu")).method.steps == 4


def test_other_step_counts_and_settings_are_refused():
    with pytest.raises(ValueError, match="found 3, and 2 or 4 would be right"):
        spelled(KD, Settings(), 3, "vp")
    assert spelled(KD, Settings(), 3, "flow").call["sigmas"] == [1.0, 1 - 1 / 3, 1 - 2 / 3]
    with pytest.raises(ValueError, match="loss must be 'squared' or 'absolute'; found 'l2'"):
        Settings(loss="l2")
