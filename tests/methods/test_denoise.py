"""Denoising beyond its identities: the loss of a given network, at which times, how a student is sampled, and what is
refused."""
from __future__ import annotations

import pytest
import torch

from stepdistill.errors import RequestError
from stepdistill.methods.base import Trained
from stepdistill.methods.trajectory.denoise import Denoise, Settings
from stepdistill.proofs import denoise, paths_denoise
from stepdistill.proofs.denoise import made
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem, off_law, stock_times
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check

from ..proofs.planting import first_red, of, plant
from .players import spelled


def test_the_loss_of_a_flow_that_halves_every_state():
    """x_0 = x_t / 2 says the velocity x_t / (2 t), and eps - x_0 is right."""
    problem = Problem(2, "flow")
    batch, step = problem.batch(500), problem.step(500)
    student = FunctionRole(problem.schedule, lambda x, t, cond: x / 2, problem.kind)
    found = made(problem, student).loss(batch, step)["denoising"]
    eps, t = step.normal("noise", batch.shape).double(), ((step.uniform("t") * 1000).floor() + 1) / 1000
    x_t = (1 - t)[:, None] * batch.x0 + t[:, None] * eps
    assert found.item() == pytest.approx((x_t / (2 * t[:, None]) - (eps - batch.x0)).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("noise", NAMES)
def test_it_is_the_error_of_what_the_network_says(noise):
    """Of a network that says nothing, the mean square of what it is to say."""
    problem = Problem(3, noise)
    batch, step = problem.batch(500), problem.step(500)

    def silent(x, t, cond):
        found = problem.teacher(x, t, cond)
        return type(found)(torch.zeros_like(x), x, t, problem.schedule, problem.kind)
    silent.schedule = problem.schedule
    eps, t = step.normal("noise", batch.shape).double(), ((step.uniform("t") * 1000).floor() + 1) / 1000
    alpha, sigma = problem.schedule.alpha(t)[:, None], problem.schedule.sigma(t)[:, None]
    right = {"eps": eps, "v": alpha * eps - sigma * batch.x0, "velocity": eps - batch.x0}[problem.kind]
    assert made(problem, silent).loss(batch, step)["denoising"].item() == pytest.approx(right.square().mean().item(),
                                                                                        rel=1e-6)


@pytest.mark.parametrize("noise", NAMES)
def test_times_are_those_of_the_settings(noise):
    problem = Problem(4, noise)
    student = FunctionRole(problem.schedule, lambda x, t, cond: x, problem.kind)
    made(problem, student, t_range=(0.3, 0.6)).loss(problem.batch(20_000), problem.step(20_000))
    ((_, t, _),) = student.calls
    assert t.min() >= 0.301 and t.max() <= 0.601 and off_law(t, stock_times(0.3, 0.6)) < 6


@pytest.mark.parametrize("full", [True, False])
def test_needs(full):
    assert Denoise.needs(Settings(), full) == {"student": Trained("teacher")}


def test_it_is_sampled_as_any_diffusion_model():
    assert spelled(Denoise, Settings(), 25, "vp").scheduler == "DDIMScheduler"
    # 30 does not divide 1000
    assert spelled(Denoise, Settings(), 30, "vp").scheduler == "EulerDiscreteScheduler"
    assert spelled(Denoise, Settings(), 28, "flow").call["num_inference_steps"] == 28


@pytest.mark.parametrize("wrong", [{"t_range": (0.5, 0.5)}, {"noise_law": "even"}, {"std": 0.0}, {"shift": 0.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


FAULTS = [
    of("denoise", "data in the place of noise", "batch.x0, eps).mean()", "eps, batch.x0).mean()"),
    of("denoise", "a state of another noise", "add_noise(batch.x0, eps, t)",
       'add_noise(batch.x0, step.normal("other", batch.shape), t)'),
    of("denoise", "no prompt", "(x_t, t, batch.cond)", "(x_t, t, batch.cond.null)"),
    of("denoise", "all times, whatever the settings", "noise_levels(settings, self.schedule)",
       "noise_levels(settings, self.schedule, True)"),
    of("denoise", "sampled under fresh noise", "Inference(steps, exact", "Inference(steps, noise=1.0, exact"),
    of("denoise", "a time late", "(x_t, t, batch.cond)", "(x_t, (t + 0.001).clamp(max=1), batch.cond)"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_turns_a_row_red(fault, monkeypatch):
    assert denoise.paths is paths_denoise.paths                  # whole, before their method is not
    plant(monkeypatch, fault)
    noticed = first_red(row for noise in NAMES for row in (*denoise.closed_forms(Problem(5, noise)),
                                                           *paths_denoise.paths(Problem(5, noise))))
    print(f"\n{fault.name}\n    {noticed}")
    assert noticed


OWN = {"images": None, "cache": False, "count": 8, "samples": {"prompts": "shapes", "solver": "own",
                                                               "call": {"num_inference_steps": 4}}}


@pytest.mark.parametrize(("changes", "message"), [
    ({"guidance": 3.0}, "guidance is 3.0, but denoise asks no teacher that could be guided"),
    ({"data": {**OWN, "batch": 4, "samples": {"prompts": "shapes", "solver": "own"}}},
     "have solver: own and call: None, but a call is of solver: own"),
    ({"data": {**OWN, "batch": 4, "samples": {"prompts": "shapes", "call": {"num_inference_steps": 4}}}},
     "have solver: dpmpp_2m and call"),
    ({"data": {**OWN, "batch": 4, "samples": {**OWN["samples"], "guidance": 2.0}}},
     "data.samples.guidance is 2, but the pipeline is called as"),
    ({"data": {**OWN, "batch": 4, "samples": {**OWN["samples"], "call": {"steps": 4}}}},
     "data.samples.call names steps, which a call of StableDiffusionPipeline"),
    ({"data": {**OWN, "batch": 4}, "train": {"updates": 1, "precision": "fp16"}},
     "train.precision is fp16, in which the pipeline itself"),
])
def test_what_cannot_be_is_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(RequestError) as caught:
        check(Recipe.load("shapes/denoise", changes))
    assert message in str(caught.value)


def test_samples_by_the_pipelines_own_call_are_of_pipelines_alone():
    with pytest.raises(RequestError, match="data.samples.solver is own, but the teacher is Toy"):
        check(Recipe.load("toy/denoise",
                          {"stages": [{}], "data": {**OWN, "batch": 4,
                                                    "samples": {**OWN["samples"], "prompts": "assets/toy"}}}))


@pytest.mark.parametrize("name", ["shapes/denoise", "shapes-sd3/denoise", "toy/denoise"])
def test_shipped_recipes_are_served(name):
    for stage in Recipe.load(name).stages:
        check(stage)
