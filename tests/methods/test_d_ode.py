"""D-ODE beyond its identities: what is trained and saved, how a run is drawn with, and what is refused."""
import json
import shutil
from pathlib import Path

import pytest
import torch

from stepdistill import api
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.mixing import Mixing
from stepdistill.diffusion.sampler import Sampler
from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Inference, Trained
from stepdistill.methods.trajectory.d_ode import DODE, Settings
from stepdistill.proofs.d_ode import least_squares
from stepdistill.proofs.problem import NAMES, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check
from stepdistill.run.preview import student_samples
from stepdistill.run.setup import open_run, setup
from stepdistill.run.targets import call_as_asked, open_target, student_target
from stepdistill.training import checkpoints

from .players import spelled

KEPT = torch.tensor([0.2, -0.3, 0.1])


def table(teacher, **more):
    return {"method": "d_ode", "teacher": str(teacher), "student": "solver", "steps": 4, "guidance": 3.0,
            "settings": {"substeps": 2}, "data": {"prompts": ["a red ring"], "batch": 2},
            "train": {"updates": 2, "lr": 0.1, "weight_decay": 0.0, "checkpoint_every": 1}} | more


def fitted(teacher):
    run = setup(Recipe.load(table(teacher)), torch.device("cpu"))
    run.roles.load_state_dict("student", {"shares": KEPT})
    return run


@pytest.mark.long
def test_adam_comes_to_each_step_s_least_squares():
    """On fresh noises of a Gaussian of two variances; by hand on many at once."""
    problem, count = Problem(0, "vp"), 256
    shares = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    roles = {"teacher": problem.teacher, "student": Mixing(problem.teacher, shares, "eps")}
    method = DODE(Settings(), roles, problem.w, problem.sampler(DODE.inference(Settings(), 4, problem.schedule)))
    adam, updates = torch.optim.AdamW([shares], 0.1, (0.9, 0.99), weight_decay=0.0), 80
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, updates)
    for index in range(updates):
        adam.zero_grad()
        method.loss(problem.batch(count, data=False), problem.step(count, index=index))["solver"].backward()
        adam.step()
        decay.step()
    torch.testing.assert_close(shares.detach(), least_squares(problem, "eps"), rtol=0, atol=0.05)


def test_the_first_step_is_ddim_s_and_the_second_looks_back():
    problem = Problem(1, "flow")
    role = Mixing(problem.teacher, torch.tensor([0.4]), "x0")
    sampler = problem.sampler(DODE.inference(Settings(), 2, problem.schedule)).fitted(role)
    noise, cond = problem.normal(8, problem.dim), problem.cond(8)
    one, half = (torch.full((8,), t, dtype=torch.float64) for t in (1.0, 0.5))
    start, middle, end = sampler.states(role, noise, cond)
    first, second = problem.teacher(noise, one, cond), problem.teacher(middle, half, cond)
    torch.testing.assert_close(middle, noise + (first.x0 - noise) / 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, second.x0 + 0.4 * (second.x0 - first.x0), rtol=0, atol=1e-7)
    assert torch.equal(start, noise)


@pytest.mark.parametrize("noise", NAMES)
def test_without_shares_it_is_ddim(noise):
    problem = Problem(2, noise)
    sampler = problem.sampler(DODE.inference(Settings(), 4, problem.schedule))
    at, cond = problem.normal(8, problem.dim), problem.cond(8)
    role = Mixing(problem.teacher, torch.zeros(3), "eps")
    assert torch.equal(sampler.fitted(role)(role, at, cond), sampler(problem.teacher, at, cond))
    assert sampler.fitted(problem.teacher) is sampler


def test_a_solver_is_of_so_many_steps_without_fresh_noise():
    problem = Problem(3, "vp")
    role = Mixing(problem.teacher, torch.zeros(3), "eps")
    with pytest.raises(ValueError, match="shares for 4 steps that add no noise; found 5 steps"):
        problem.sampler(Inference(5)).fitted(role)
    with pytest.raises(ValueError, match="found 4 steps with fresh noise"):
        problem.sampler(Inference(4, noise=1.0)).fitted(role)


def test_roles_and_steps():
    assert DODE.needs(Settings(), True) == {"teacher": Frozen(), "student": Trained("teacher", solver="eps")}
    assert spelled(DODE, Settings(), 5, "vp", 2.5).call == {"num_inference_steps": 5, "guidance_scale": 2.5}
    assert spelled(DODE, Settings(), 3, "flow").scheduler == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(ValueError, match="at least 2 steps, of which the second looks back; found 1"):
        spelled(DODE, Settings(), 1, "flow")
    with pytest.raises(ValueError, match="only where their number divides its 1000 times; found 3"):
        spelled(DODE, Settings(), 3, "vp")


@pytest.mark.parametrize("wrong", [{"substeps": 1}, {"output": "v"}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize("changes, says", [
    ({"student": "full"}, "student trains a network, but d_ode trains a solver.*let it be solver"),
    ({"student": {"lora": {"rank": 2}}}, "student trains a network, but d_ode"),
    ({"method": "mlcm", "settings": {}}, "student is solver, but mlcm trains a network: let it be {lora"),
    ({"guidance": [1.0, 3.0]}, r"guidance is \[1.0, 3.0\], but a solver is fitted at one scale"),
    ({"train": {"updates": 1, "fsdp": True}}, "train.fsdp is on.*the student is solver"),
    ({"steps": 1}, "steps is 1, which cannot be sampled: d_ode makes solvers of at least 2 steps"),
    ({"stages": [{"steps": 8}, {"steps": 4}]}, "student is solver, in one of several stages"),
])
def test_what_does_not_go_with_a_solver_is_refused_before_anything_is_loaded(tiny_teacher, changes, says):
    with pytest.raises(RequestError, match=says):
        check(Recipe.load(table(tiny_teacher) | changes))


def test_the_recipe_says_solver_again(tiny_teacher):
    recipe = Recipe.load(table(tiny_teacher))
    assert recipe.resolved()["student"] == "solver" and Recipe.load(recipe.resolved()).trains_solver
    with pytest.raises(RequestError, match="should be full, or {lora: {rank: 32}}"):
        Recipe.load(table(tiny_teacher, student="solvers"))


def test_its_pipeline_draws_as_the_preview_does(tiny_teacher):
    """Two ways to one picture: our sampler on the guided role, and the stock pipeline under our scheduler."""
    run = fitted(tiny_teacher)
    noise = torch.randn(1, *run.teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    cond = run.teacher.encode(["a red ring"])
    ours = run.teacher.decode(student_samples(run, lambda name: noise, cond))
    target = student_target(run, "student")
    target.pipeline.set_progress_bar_config(disable=True)
    call = dict(target.call) | {"output_type": "pt"}
    theirs = target.pipeline(["a red ring"], latents=noise, **call).images * 2 - 1
    torch.testing.assert_close(theirs, ours.clamp(-1, 1), rtol=0, atol=2e-4)
    plain = run.teacher.decode(run.method.sampler(guided(run.roles.base, 3.0), noise, cond))
    assert (plain - ours).abs().max() > 1e-3 and target.call["guidance_scale"] == 3.0
    with pytest.raises(RequestError, match="made for 4 steps.*of each of which its solver has a number"):
        call_as_asked(target, 8, None, pytest.fail)


@pytest.fixture(scope="module")
def trained(tiny_teacher, tmp_path_factory) -> Path:
    return api.train(table(tiny_teacher), out=tmp_path_factory.mktemp("d_ode") / "run")


def test_a_run_holds_its_shares_and_nothing_of_a_network(trained):
    found = checkpoints.load(checkpoints.latest(trained))
    assert found["role-student"].keys() == {"shares"} and found["role-student"]["shares"].shape == (3,)
    assert found.keys() == {"role-student", "optimizer-student"} and found["role-student"]["shares"].abs().min() > 0
    run = open_run(trained)
    assert torch.equal(run.roles["student"].shares, found["role-student"]["shares"])
    assert run.scheduler().mixer.shares == tuple(found["role-student"]["shares"].tolist())


def test_a_run_is_resumed_to_the_last_bit(trained, tiny_teacher, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    shutil.rmtree(checkpoints.latest(again))
    api.train(table(tiny_teacher), out=again, resume=True)
    one, other = (checkpoints.load(checkpoints.latest(run)) for run in (trained, again))
    assert all(torch.equal(one[part][name], other[part][name]) for part in one for name in one[part])


@pytest.mark.long
def test_micro_batches_are_slices_of_one_batch(tiny_teacher, trained, tmp_path):
    found = api.train(table(tiny_teacher, train=table(tiny_teacher)["train"] | {"accumulate": 2}), out=tmp_path / "run")
    one, other = (checkpoints.load_role(checkpoints.latest(run), "student")["shares"] for run in (trained, found))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_an_average_of_the_shares_is_what_samples(tiny_teacher):
    run = setup(Recipe.load(table(tiny_teacher, train={"updates": 2, "ema": 0.9})), torch.device("cpu"))
    assert run.sampling_role == "ema" and run.roles["ema"].shares is not run.roles["student"].shares
    with torch.no_grad():
        run.roles["student"].shares.add_(1.0)
    run.roles.follow("student")
    torch.testing.assert_close(run.scheduler().mixer.shares, (0.1,) * 3)


def test_pictures_of_a_run(trained, tmp_path):
    picture, = api.sample(trained, "a red ring", out=tmp_path / "one.png")
    assert picture.size == (16, 16)
    assert open_target(trained, "run").target.fixed_steps


def test_it_leaves_in_no_export_and_says_what_would(trained):
    for to in ("pipeline", "lora"):
        with pytest.raises(RequestError, match="is a solver .d_ode.: its 3 numbers .* no scheduler of diffusers has a "
                           "config that holds them. `stepdistill sample` and `stepdistill bench` draw with it"):
            api.export(trained, to)
    assert not (trained / "export").exists()
    with pytest.raises(RequestError, match="is a run that trained a solver"):
        api.bench(trained, out=trained / "bench", compose=[trained])


def test_no_sampler_is_read_off_its_scheduler(tiny_teacher):
    """So that nobody takes it for plain DDIM's: an export, or a teacher's help between its steps."""
    run = fitted(tiny_teacher)
    with pytest.raises(ValueError, match="no sampler reads a MixingDDIMScheduler"):
        Sampler.of(run.scheduler(), 4, run.teacher.schedule)


def test_the_plan_counts_its_passes(tiny_teacher):
    """The student's 4 guided steps and the teacher's 8, at two evaluations each; no gradient goes through a network."""
    found = api.plan(table(tiny_teacher))
    assert found["roles"]["student"] == {"parameters": 3, "trained": 3, "bytes": 12}
    assert (found["passes"]["forward"], found["passes"]["backward"]) == (24, 0)
    json.dumps(found)
