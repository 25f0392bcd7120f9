"""Reward feedback in closed form, the reward of Toy against Bayes' rule by hand, and rewards in recipes."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepdistill import resources
from stepdistill.data.stream import Stream
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.diffusion.toy import Toy
from stepdistill.errors import RequestError
from stepdistill.methods.base import Codec, Follows, Inference, Reward, Trained
from stepdistill.methods.hybrid.reward import RewardFeedback, Settings
from stepdistill.models import rewards
from stepdistill.models.toy_reward import ToyReward
from stepdistill.proofs.problem import FunctionRole, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check
from stepdistill.run.data import dataset
from stepdistill.run.inference import inference_of
from stepdistill.run.plan import plan
from stepdistill.run.setup import Previous, setup, student_weights, train_config
from stepdistill.run.sources import reward_of
from stepdistill.training import Trainer

COUNT = 64


def made(student, begun, problem, steps=1, reward=lambda pixels, prompts: pixels[:, 0], **settings) -> RewardFeedback:
    chosen = Settings(**settings)
    roles = {"student": student, "begun": begun, "decode": lambda x: 3 * x, "reward": reward}
    return RewardFeedback(chosen, roles, 1.0,
                          problem.sampler(RewardFeedback.inference(chosen, steps, problem.schedule)))


def batch_of(problem, count=COUNT):
    return replace(problem.batch(count, data=False), prompts=[f"prompt {i}" for i in range(count)])


# -- the loss ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("noise", ["vp", "flow"])
def test_the_reward_pulls_along_its_slope_and_nearness_back_to_where_the_student_began(noise):
    problem = Problem(3, noise)
    step, begun, student = problem.step(COUNT), problem.affine(), problem.affine()
    batch = batch_of(problem)
    losses = made(student, begun, problem, weight=0.5, nearness=2.0).loss(batch, step)
    z = step.normal("start", batch.shape).double()
    x, before = (role.m + z @ role.S.T for role in (student, begun))
    torch.testing.assert_close(losses["reward"].double(), -0.5 * (3 * x[:, 0]).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["nearness"].double(), 2 * (x - before).square().mean(), rtol=1e-5, atol=1e-6)
    known = -0.5 * 3 * torch.eye(problem.dim).double()[0] + 4 * (x - before).mean(0).detach() / problem.dim
    found, = torch.autograd.grad(sum(losses.values()), student.m, retain_graph=True)
    torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(sum(losses.values()), begun.m, allow_unused=True) == (None,)


def test_samples_above_the_margin_are_left_alone():
    problem = Problem(3, "vp")
    step, student = problem.step(COUNT), problem.affine()
    score = 3 * (student.m + step.normal("start", (problem.dim,)).double() @ student.S.T)[:, 0].detach()
    method = made(student, student, problem, margin=0.4, nearness=0.0)
    found = method.loss(batch_of(problem), step)
    torch.testing.assert_close(found["reward"].double(), (0.4 - score).clamp(min=0).mean(), rtol=1e-5, atol=1e-6)
    slope, = torch.autograd.grad(found["reward"], student.m)
    assert slope[0].item() == pytest.approx(-3 * (score < 0.4).double().mean().item())
    assert 0 < (score < 0.4).double().mean() < 1


@pytest.mark.parametrize("last, judged", [(1, {1}), (2, {1, 2}), (9, {1, 2, 3, 4})])
def test_one_of_the_last_evaluations_is_judged_and_takes_gradients_alone(last, judged):
    problem, seen = Problem(0, "vp"), set()
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for index in range(24):
        taken = []
        student = FunctionRole(problem.schedule,
                               lambda x, t, cond: taken.append(torch.is_grad_enabled()) or 0.5 * x.double() + shift)
        begun = FunctionRole(problem.schedule, lambda x, t, cond: 0.25 * x.double())
        losses = made(student, begun, problem, 4, last=last).loss(batch_of(problem, 2), problem.step(2, index=index))
        (x, t, _), = begun.calls
        seen.add(round(4 * t[0].item()))
        assert torch.equal(student.calls[-1][0], x) and torch.equal(student.calls[-1][1], t)
        assert len(taken) == 5 - round(4 * t[0].item()) and taken == [False] * (len(taken) - 1) + [True]
        assert torch.autograd.grad(losses["reward"], shift)[0].item() == pytest.approx(-3.0)
    assert seen == judged


def test_a_reward_reads_the_prompts_of_its_pictures():
    problem, heard = Problem(0, "flow"), []
    batch = batch_of(problem, 4)
    made(problem.affine(), problem.affine(), problem,
         reward=lambda pixels, prompts: heard.append(prompts) or pixels[:, 0]).loss(batch, problem.step(4))
    assert heard == [batch.prompts]


def test_who_is_needed_and_what_is_refused():
    needs = {"student": Trained("teacher"), "begun": Follows("student", 0.0, until=0), "decode": Codec(),
             "reward": Reward()}
    assert RewardFeedback.needs(Settings(), full=False) == needs and not needs["begun"].moves
    del needs["begun"]
    assert RewardFeedback.needs(Settings(nearness=0.0), full=True) == needs
    for wrong in ({"last": 0}, {"weight": 0.0}, {"nearness": -1.0}):
        with pytest.raises(ValueError, match="last must be at least 1, weight above 0 and nearness at least 0; found"):
            Settings(**wrong)


# -- the reward of Toy -------------------------------------------------------------------------------------------------

def test_the_reward_of_toy_is_bayes_rule():
    place = resources.pipeline("assets/toy")
    toy, reward = Toy(place), ToyReward(place)
    points, labels = toy.points(torch.arange(200))
    points = (points + 0.3 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0))).double()
    means, covariances, weights = (torch.tensor(toy.config[name], dtype=torch.float64)
                                   for name in ("means", "covariances", "weights"))
    log_p = torch.stack([torch.distributions.MultivariateNormal(m, c).log_prob(points.flatten(1))
                         for m, c in zip(means, covariances)], 1) + weights.log()
    for label in (0, 1):
        known = log_p[:, toy.labels == label].logsumexp(1) - log_p.logsumexp(1)
        torch.testing.assert_close(reward(points, [f"class {label}"] * 200), known, rtol=1e-8, atol=1e-8)
    assert reward(points, [""] * 200).abs().max() < 1e-9
    exact = toy.points(torch.arange(2000))
    assert reward(exact[0], toy.captions(torch.arange(2000))).mean() > -0.05
    with pytest.raises(RequestError, match="Toy knows no prompt 'a cat'"):
        reward(points[:1], ["a cat"])


# -- in a recipe -------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tiny_teacher):
    entries = {"method": "reward", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "steps": 2,
               "data": {"prompts": "shapes", "batch": 2}, "train": {"updates": 2}}
    return lambda **changes: Recipe.load(entries | changes)


LCM = {"method": "lcm", "guidance": 2.0, "settings": {"nodes": 10}, "data": {"images": "shapes", "count": 8}}


def test_a_stage_is_sampled_as_the_student_that_it_begins_with(recipe):
    schedule = RectifiedFlow()
    assert inference_of(recipe(), schedule) == Inference(2)
    assert inference_of(recipe(settings={"fresh": True}), schedule, 3) == Inference(3, noise=1.0)
    after = recipe(stages=[LCM, {"steps": 4}, {"steps": 3}])
    assert inference_of(after, schedule) == Inference(3, noise=1.0, nodes=10)
    assert inference_of(after.previous, schedule) == Inference(4, noise=1.0, nodes=10)
    after = recipe(stages=[{"method": "dmd2", "guidance": 2.0, "settings": {"gan_weight": 0, "start_time": 0.4},
                            "steps": 1}, {"steps": 1}])
    assert inference_of(after, schedule).times == (0.4,)
    run = setup(recipe(stages=[LCM, {"steps": 4}]), torch.device("meta"))
    assert run.stock.scheduler == "LCMScheduler" and run.method.sampler.nfe == 4


def test_the_student_that_a_stage_begins_with_is_kept_and_batches_hold_their_prompts(tmp_path):
    recipe = Recipe.load("toy/reward", {"train.updates": 2, "data.batch": 8, "train.ema": None})
    before = setup(recipe.previous, torch.device("cpu"))
    with torch.no_grad():
        for parameter in before.roles.parameters("student"):
            parameter.add_(0.05)
    weights = student_weights(recipe.previous, before.roles.state_dict("student"))
    run = setup(recipe, torch.device("cpu"), previous=Previous(weights, ""))
    known = {name: tensor.clone() for name, tensor in before.roles.state_dict("student").items()}
    same = lambda name: all(torch.equal(tensor, known[key]) for key, tensor in run.roles.state_dict(name).items())
    assert same("student") and same("begun") and run.judged and not before.judged
    stream = Stream(dataset(run), 8, 0, run.teacher.latent_shape, prompts=run.judged)
    batch = stream.batch(0, "student")
    assert torch.equal(run.teacher.encode(batch.prompts).label, batch.cond.label)
    trainer = Trainer(run.method, run.roles, stream, train_config(recipe), tmp_path / "run")
    trainer.step(0)
    trainer.step(1)
    assert not same("student") and same("begun") and "begun" in trainer.saved and "reward" not in trainer.saved


@pytest.mark.long
def test_a_plan_counts_the_reward_and_what_is_to_be_fetched(recipe, monkeypatch):
    found, reward = plan(recipe()), reward_of("shapes_reward")
    size = sum(parameter.numel() for parameter in reward.parameters())
    assert found["roles"]["reward"] == {"parameters": size, "trained": 0, "bytes": 4 * size} and not found["downloads"]
    assert found["passes"] == {"forward": 3, "backward": 1, "batch": 2, "updates": 2}
    folder, fetched = str(resources.locate("assets/shapes-clip")), []
    monkeypatch.setattr(rewards, "cached_file", lambda place, file: fetched.append(file) or f"{folder}/{file}")
    found = plan(recipe(reward="pickscore"))
    assert fetched and "model.safetensors" not in fetched
    assert found["downloads"] == ["yuvalkirstain/PickScore_v1 (up to 0.0 GB)"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": {"prompts": ["a cat"], "batch": 2}}, "method is reward, which raises a reward, and nothing says which: "
     "name one, such as reward: pickscore, which is a download, or reward: hpsv2=FOLDER"),
    ({"data": {"prompts": ["a cat"], "batch": 2}, "reward": "shapes_reward"}, "reward is shapes_reward, which scores "
     "captions of Shapes alone, but data.prompts are others"),
    ({"reward": "hpsv2=no/such/folder"}, "reward is hpsv2=no/such/folder, which cannot be raised: the weights of hpsv2 "
     "cannot be had from no/such/folder: there is no such folder"),
    ({"reward": "beauty"}, "reward is beauty, which cannot be raised: there is no reward beauty: known are pickscore"),
    ({"data": {"prompts": "shapes", "batch": 2, "caption_dropout": 0.1}}, "data.caption_dropout is 0.1, but a reward "
     "scores each picture by its caption"),
    ({"stages": [LCM, {"settings": {"fresh": True}}]}, "settings.fresh is on, but the student is sampled as that of "
     "the stage before, lcm"),
    ({"guidance": 2.0}, "guidance is 2.0, but reward asks no teacher"),
    ({"method": "lcm", "reward": "pickscore", "data": {"images": "shapes", "batch": 2}}, "reward is pickscore, but lcm "
     "raises none: leave it out"),
    ({"teacher": "assets/toy", "data": {"prompts": "assets/toy", "batch": 2}, "student": "full", "reward": "pickscore"},
     "reward is pickscore, but it judges pictures, and the teacher is Toy"),
])
def test_what_cannot_be_raised_is_refused_before_anything_is_loaded(recipe, changes, message):
    with pytest.raises(RequestError, match=message):
        check(recipe(**changes))


def test_a_recipe_keeps_where_a_reward_lies(recipe):
    resolved = recipe(reward="shapes_reward=assets/shapes-clip").resolved()
    assert resolved["reward"] == "shapes_reward=assets/shapes-clip" and Recipe.load(resolved).resolved() == resolved
