"""BOOT beyond its identities: what the networks are given and told, whose gradient it is, how it leaves."""
import pytest
import torch

from stepdistill.methods.base import Frozen, Trained
from stepdistill.methods.trajectory.boot import BOOT, Settings
from stepdistill.proofs.boot import made, path, signals
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.setup import setup

from .players import spelled


@pytest.mark.parametrize("noise", NAMES)
def test_the_student_is_given_noise_alone_and_told_the_nodes(noise):
    problem = Problem(0, noise)
    student = FunctionRole(problem.schedule, lambda x, t, cond: x / 2 + cond.r[:, None], "x0")
    teacher = FunctionRole(problem.schedule, lambda x, t, cond: x / 3, "x0")
    batch, step = problem.batch(300, data=False), problem.step(300)
    made(problem, student, teacher).loss(batch, step)
    e = step.normal("start", batch.shape)
    (x, t, above), (again, at, below) = student.calls
    assert torch.equal(x, e) and torch.equal(again, e) and (t == 1).all() and (at == 1).all()
    torch.testing.assert_close(above.r - below.r, torch.full((300,), 0.05, dtype=torch.float64), rtol=0, atol=1e-12)
    assert below.r.min() == 0 and above.r.max() == 1
    (x_t, asked, _), = teacher.calls
    known = problem.schedule.sigma(above.r) / problem.schedule.sigma(t)      # of x, the rest is the student's signal
    share = problem.schedule.alpha(above.r) - known * problem.schedule.alpha(t)
    x0 = e.double() / 2 + above.r[:, None]
    assert torch.equal(asked[:300], above.r)
    torch.testing.assert_close(x_t[:300].double(), share[:, None] * x0 + known[:, None] * e, rtol=0, atol=1e-5)


def test_on_a_flow_the_target_is_the_exact_step_of_the_signal_ode():
    """y_s = D + (y_t - D) (s (1 - t)) / (t (1 - s)), which is D + (y_t - D) e^(lambda_s - lambda_t)."""
    problem = Problem(1, "flow")
    batch, step = problem.batch(200, data=False), problem.step(200)
    student = FunctionRole(problem.schedule, lambda x, t, cond: x / 2 + cond.r[:, None], "x0")
    teacher = FunctionRole(problem.schedule, lambda x, t, cond: 0 * x + 1.5, "x0")
    method = made(problem, student, teacher)
    found = method.loss(batch, step)["bootstrap"].item()
    above, below = (call[2].r[:, None] for call in student.calls)
    e = step.normal("start", batch.shape).double()
    ratio = below * (1 - above) / (above * (1 - below))
    aim = 1.5 + (e / 2 + above - 1.5) * ratio
    assert found == pytest.approx((e / 2 + below - aim).square().mean().item(), rel=1e-5)


def test_at_the_first_node_the_target_is_the_teacher_s_own_guess():
    """Whatever the student says at t = 1, which is the paper's boundary."""
    problem = Problem(2, "vp")
    student = FunctionRole(problem.schedule, lambda x, t, cond: 0 * x + 7.0, "x0")
    batch, step = problem.batch(64, data=False), problem.step(64)
    method = made(problem, student, nodes=1)
    e, one = step.normal("start", batch.shape), torch.ones(64, dtype=torch.float64)
    known = problem.teacher(e, one, problem.guided_cond(64, problem.w)).x0
    assert method.loss(batch, step)["bootstrap"].item() == pytest.approx((7.0 - known).square().mean().item(), rel=1e-5)


def test_an_error_at_one_node_is_handed_down_to_the_next_alone():
    problem = Problem(3, "flow")
    right, wrong = signals(problem, path(problem, 20)), 0.3
    off = FunctionRole(problem.schedule, lambda x, t, cond: right(x, t, cond).x0
                       + wrong * ((cond.r - 0.5).abs() < 1e-9)[:, None], problem.kind)
    batch, step = problem.batch(2000, data=False), problem.step(2000)
    method = made(problem, off)
    method.schedule = problem.schedule
    found = method.loss(batch, step)["bootstrap"].item()
    t = off.calls[0][2].r
    at, after = ((t - 0.55).abs() < 1e-9), ((t - 0.5).abs() < 1e-9)
    assert found > 0 and at.any() and after.any()
    alone = wrong**2 * at.double().mean().item()
    assert alone < found < 2 * alone + wrong**2 * after.double().mean().item()


def test_gradients_are_of_the_node_below_alone():
    problem, above, below = Problem(4, "flow"), *(torch.ones((), dtype=torch.float64, requires_grad=True)
                                                  for _ in range(2))
    calls = []

    def x0_of(x, t, cond):
        calls.append(cond)
        return (above if len(calls) == 1 else below) * x / 2
    loss = made(problem, FunctionRole(problem.schedule, x0_of, "x0")).loss(problem.batch(16, data=False),
                                                                          problem.step(16))["bootstrap"]
    found = torch.autograd.grad(loss, (above, below), allow_unused=True)
    assert found[0] is None and found[1].abs() > 0


def test_roles_and_steps():
    assert BOOT.needs(Settings(), False) == {"teacher": Frozen(), "student": Trained("teacher", reads=("r",))}
    assert spelled(BOOT, Settings(), 1, "vp").scheduler == "DDIMScheduler"
    assert spelled(BOOT, Settings(), 1, "flow").call["sigmas"] == [1.0]
    with pytest.raises(ValueError, match="boot makes students of 1 step.*found 2"):
        spelled(BOOT, Settings(), 2, "flow")


def test_an_untrained_student_says_the_teacher_s_guess_at_every_node(tiny_teacher):
    table = {"method": "boot", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "steps": 1,
             "data": {"prompts": ["a red ring"], "batch": 2}, "train": {"updates": 1}}
    run = setup(Recipe.load(table), torch.device("cpu"))
    e, one = torch.randn(2, *run.teacher.latent_shape), torch.ones(2, dtype=torch.float64)
    cond = run.teacher.encode(["a red ring"] * 2)
    for t in (0.0, 0.5, 1.0):
        torch.testing.assert_close(run.method.signal(e, t * one, cond), run.roles["teacher"](e, one, cond).x0,
                                   rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"solver_steps": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
