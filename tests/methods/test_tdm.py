"""TDM beyond its identities: one rollout for both, levels within segments, what is served and what is refused."""
import pytest
import torch

from stepdistill.methods.base import Inference
from stepdistill.methods.distribution.tdm import TDM, Settings
from stepdistill.proofs.paths import Exact
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.proofs.tdm import made
from stepdistill.recipe import Recipe
from stepdistill.run.plan import plan

from .players import spelled

F64 = torch.float64
COUNT = 20_000


def halved(problem: Problem) -> FunctionRole:
    return FunctionRole(problem.schedule, lambda x, t, cond: x / 2, "x0")


def played(problem: Problem, steps: int, count: int = COUNT, **settings):
    """The method after one turn of its critic, and the student's moment."""
    method, batch, step = (made(problem, halved(problem), halved(problem), steps, **settings),
                           problem.batch(count, False), problem.step(count, "critic"))
    method.critic_loss(batch, step)
    return method, batch, problem.step(count, kept=step.kept)


@pytest.mark.parametrize("noise", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 25])
def test_levels_are_stock_times_of_the_segment_that_the_state_begins(noise, steps):
    method, batch, step = played(Problem(0, noise), steps)
    *_, s, t = method.state(batch, step)
    nodes = t * 1000
    assert torch.allclose(nodes, nodes.round(), atol=1e-9) and t.min() >= 0.02
    exit = step.integers("exit", steps)
    end, begin = (1 - (exit + i).double() / steps for i in range(2))
    assert torch.allclose(s, begin, atol=6e-4)                               # on 1000 nodes where they are discrete
    assert (t - begin >= 0.01 - 1.2e-3).all() and (end - t >= 0.01 - 1.2e-3).all()
    widest = (t - begin).max().item()
    assert widest == pytest.approx(1 / steps - 0.01, abs=1.5e-3)


def test_levels_above_and_random_ends():
    problem = Problem(1, "flow")
    method, batch, step = played(problem, 4, levels="above", random_end=True)
    _, _, s, t = method.state(batch, step)
    exit = step.integers("exit", 4)
    end = 1 - exit.double() / 4
    place = (end - s) * 4                                                    # 1 where the segment begins
    assert (place.max() <= 1 + 1e-6 and place.min() >= 0.08 - 1e-6
            and place.mean().item() == pytest.approx(0.54, abs=0.01))
    assert (t > s).all() and t[exit == 3].max() == 0.99 and 0.02 <= t[exit == 3].min() < 0.05


@pytest.mark.parametrize("noise", NAMES)
def test_both_see_states_of_one_rollout(noise):
    """The student is asked 3 times for the states, and once more by each loss, there alone with gradients."""
    problem = Problem(2, noise)
    leaf, grads = torch.ones((), dtype=F64, requires_grad=True), []
    student = FunctionRole(problem.schedule, lambda x, t, cond: grads.append(torch.is_grad_enabled())
                           or leaf * x / 2, "x0")
    method, batch = made(problem, student, halved(problem), 4, critic_steps=2), problem.batch(64, data=False)
    critic = problem.step(64, "critic")
    method.critic_loss(batch, critic)
    states = critic.kept["states"]
    method.critic_loss(batch, problem.step(64, "critic", repeat=1, kept=critic.kept))
    loss = method.student_loss(batch, problem.step(64, kept=critic.kept))["matching"]
    assert grads == [False] * 5 + [True] and critic.kept["states"] is states and not states.requires_grad
    assert torch.autograd.grad(loss, leaf)[0] != 0
    given, exit = student.calls[-1][0], problem.step(64).integers("exit", 4)
    assert torch.equal(given, states[exit, torch.arange(64)]) and exit.unique().tolist() == [0, 1, 2, 3]
    assert [(u.trains, u.repeat, u.shares) for u in method.updates()] == [(("critic",), 2, 2), (("student",), 1, 1)]


def test_the_temperature_is_the_mean_over_a_sample_unless_it_is_given():
    """With e the noise that x_t has for the student's x_0, the loss is min(SNR, 5) e^((|eps|^2 - |e|^2) / 2 T)
    |error|^2."""
    problem = Problem(3, "flow")
    batch, step = problem.batch(256, data=False), Exact(3, 0, 0.0, "critic", 0, torch.arange(256))
    critic = FunctionRole(problem.schedule, lambda x, t, cond: 0 * x, "x0")
    for temperature, known in ((None, problem.dim), (1.0, 1.0), (7.0, 7.0)):
        method = made(problem, halved(problem), critic, 4, temperature=temperature)
        found = method.critic_loss(batch, step)["denoising"]
        x0, x_s, s, t = method.state(batch, step)
        (x_t, at, _), eps = critic.calls[-1], step.normal("noise", batch.shape)
        e = (x_t - (1 - t)[:, None] * x0) / t[:, None]
        weight = ((eps**2 - e**2).sum(1) / (2 * known)).exp() * ((1 - t) / t).square().clamp(max=5)
        assert torch.equal(at, t) and found.item() == pytest.approx((weight * x0.square().mean(1)).mean().item(),
                                                                    rel=1e-9)


def test_the_state_is_the_sampler_s_own_next_one():
    problem = Problem(4, "vp")
    method, batch, step = played(problem, 4, 64)
    x0, x_s, s, t = method.state(batch, step)
    exit, states = step.integers("exit", 4), step.kept["states"]
    sample = method.sampler(halved(problem), states[0], batch.cond)
    after = torch.cat([states[1:], sample[None]])
    torch.testing.assert_close(x_s, after[exit, torch.arange(64)], rtol=1e-5, atol=1e-5)
    assert torch.equal(x0, states[exit, torch.arange(64)] / 2)


def test_the_student_leaves_by_the_stock_deterministic_sampler():
    assert TDM.inference(Settings(), 4, Problem(0, "vp").schedule) == Inference(4, noise=0.0)
    assert spelled(TDM, Settings(), 4, "vp").scheduler == "DDIMScheduler"
    assert spelled(TDM, Settings(), 4, "flow").scheduler == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(ValueError, match="1 to 25 steps; found 26"):
        TDM.inference(Settings(), 26, Problem(0, "vp").schedule)


@pytest.mark.parametrize("guidance, forward", [(1.0, 8), (2.0, 9)])
def test_passes_of_a_step(tiny_teacher, guidance, forward):
    """Three steps of the rollout, and of each loss the student and the critic; the teacher, twice where it is
    guided."""
    made = {"method": "tdm", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
            "guidance": guidance, "steps": 4,
            "data": {"prompts": "shapes", "batch": 4}, "train": {"updates": 2}}
    assert plan(Recipe.load(made))["passes"] == {"forward": forward, "backward": 2, "batch": 4, "updates": 2}


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"temperature": 0.0}, {"critic_target": "noise"},
                                     {"levels": "below"},
                                     {"critic_target": "state", "temperature": 2.0}, {"loss": "norm"},
                                     {"huber_c": 0.0}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must be|of critic_target x0"):
        Settings(**changes)
