"""DP-DMD beyond its identities: the paper's own target on a flow, who learns from what, what is served and refused."""
import pytest
import torch

from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.methods.base import Inference
from stepdistill.methods.distribution.dp_dmd import DPDMD, Settings
from stepdistill.proofs.dp_dmd import made
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.plan import plan

from .players import spelled

F64 = torch.float64
COUNT = 64


def test_on_a_flow_the_first_step_learns_the_mean_velocity_of_the_teachers_first_steps():
    """Eq. 6 and 7, by Euler's steps of the teacher's velocity: |v(eps, 1) - (eps - z) / (1 - t')|^2 times 0.05."""
    problem = Problem(0, "flow")
    v = lambda x, t, c: x * (0.3 + t[:, None]) + c.text                      # of the teacher; guided it is c's blend
    teacher = FunctionRole(problem.schedule, lambda x, t, c: x - t[:, None] * v(x, t, c), "velocity")
    student = FunctionRole(problem.schedule, lambda x, t, c: x / 2, "velocity")
    batch, step = problem.batch(COUNT, data=False), problem.step(COUNT)
    method = made(problem, student, student, 2, nodes=8, anchor=3, shift=2.0)
    method.teacher = teacher
    eps = z = step.normal("start", batch.shape).double()
    times = [2 * u / (1 + u) for u in (1, 7 / 8, 6 / 8, 5 / 8)]
    cond = problem.guided_cond(COUNT, problem.w)
    for t, r in zip(times, times[1:]):
        z = z + (r - t) * v(z, torch.full((COUNT,), t, dtype=F64), cond)
    known = 0.05 * (eps / 2 - (eps - z) / (1 - times[-1])).square().mean()       # its own velocity is eps - eps / 2
    assert method.student_loss(batch, step)["diversity"].item() == pytest.approx(known.item(), rel=1e-5)
    assert isinstance(problem.schedule, RectifiedFlow)


@pytest.mark.parametrize("noise", NAMES)
def test_matching_teaches_every_step_but_the_first(noise):
    """Each step has a number of its own, x_0 = c_i x; the sample is the product of what the steps make of a state."""
    problem = Problem(1, noise)
    numbers = torch.tensor([0.5, 0.6, 0.7, 0.8], dtype=F64, requires_grad=True)
    student = FunctionRole(problem.schedule, lambda x, t, c: numbers[(4 * (1 - t)).round().long()][:, None] * x, "x0")
    batch, step = problem.batch(COUNT, data=False), problem.step(COUNT)
    real, fake = (FunctionRole(problem.schedule, lambda x, t, c, a=a: a * x, "x0") for a in (0.1, 0.4))
    method = made(problem, student, fake)
    method.teacher = real
    losses = method.student_loss(batch, step)
    found = torch.autograd.grad(losses["matching"], numbers)[0]

    times = torch.linspace(1, 0, 5, dtype=F64)
    alpha, sigma = problem.schedule.alpha(times), problem.schedule.sigma(times)
    kept = sigma[1:] / sigma[:-1]
    leaf = numbers.detach().clone().requires_grad_()
    factors = (alpha[1:] - kept * alpha[:-1]) * leaf + kept                  # of DDIM's steps
    x = step.normal("start", batch.shape).double() * factors.prod()
    t = method.matched(step.uniform("t"))
    x_t = problem.schedule.add_noise(x.detach(), step.normal("noise", batch.shape), t)
    size = (x.detach() - 0.1 * x_t).abs().mean(1, keepdim=True)
    known = torch.autograd.grad((0.3 * x_t / size * x).mean(), leaf)[0]
    torch.testing.assert_close(found[1:], known[1:], rtol=1e-5, atol=1e-8)
    assert found[0] == 0 and known[0] != 0
    assert (torch.autograd.grad(method.student_loss(batch, step)["diversity"], numbers)[0] != 0).tolist() == [True] + [
        False] * 3


def test_the_critic_sees_whole_samples_of_its_own_draws():
    problem = Problem(2, "vp")
    student = FunctionRole(problem.schedule, lambda x, t, c: 2 * t[:, None] * x, "x0")
    critic = FunctionRole(problem.schedule, lambda x, t, c: 0 * x, "x0")
    method, batch, step = made(problem, student, critic), problem.batch(COUNT, False), problem.step(COUNT, "critic")
    found = method.critic_loss(batch, step)["denoising"]
    x = method.sampler(student, step.normal("start", batch.shape), batch.cond)
    assert found.item() == pytest.approx(x.square().mean().item(), rel=1e-6)
    assert [(u.trains, u.repeat, u.shares) for u in method.updates()] == [(("critic",), 5, 0), (("student",), 1, 0)]


def test_the_student_leaves_by_the_stock_deterministic_sampler():
    schedule = Problem(0, "vp").schedule
    assert DPDMD.inference(Settings(), 4, schedule) == Inference(4, noise=0.0)
    assert spelled(DPDMD, Settings(), 4, "vp").scheduler == "DDIMScheduler"
    assert spelled(DPDMD, Settings(), 4, "flow").scheduler == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(ValueError, match="2 or more; found 1"):
        DPDMD.inference(Settings(), 1, schedule)


@pytest.mark.parametrize("guidance, forward", [(1.0, 19), (2.0, 23)])
def test_passes_of_a_step(tiny_teacher, guidance, forward):
    """Twice 4 of the student and one of the critic; then the teacher's 3 steps, the student's 4 and both scores: of a
    guided teacher 4 evaluations count twice."""
    made = {"method": "dp_dmd", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
            "guidance": guidance, "steps": 4, "settings": {"critic_steps": 2, "anchor": 3},
            "data": {"prompts": "shapes", "batch": 4}, "train": {"updates": 2}}
    assert plan(Recipe.load(made))["passes"] == {"forward": forward, "backward": 6, "batch": 4, "updates": 2}


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"anchor": 0}, {"anchor": 31}, {"nodes": 4},
                                     {"diversity_weight": -0.1}, {"shift": 0.0}, {"t_range": (0.5, 0.5)}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must be"):
        Settings(**changes)
