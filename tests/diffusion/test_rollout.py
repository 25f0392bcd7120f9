"""The student's own states: those of its sampler, with the gradient of one prediction, on Gaussian data in closed
form."""
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.draws import Step
from stepdistill.diffusion.exact import Gaussian
from stepdistill.diffusion.flow_map import ddim_step
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.rollout import rollout, stopped, way
from stepdistill.diffusion.sampler import Sampler
from stepdistill.diffusion.schedule import RectifiedFlow, VariancePreserving
from stepdistill.methods.base import Inference
from stepdistill.models.schedulers import sampler_of, stock_call

F64 = torch.float64
C, COUNT, STEPS = 0.6, 64, 4
TEACHERS = {"vp": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
            "flow": FlowMatchEulerDiscreteScheduler()}
SCHEDULES = {"vp": VariancePreserving.of(TEACHERS["vp"].alphas_cumprod.double()), "flow": RectifiedFlow()}


class Exact(Step):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


def setting(name: str, noise: float = 0.0) -> tuple[Gaussian, Sampler, Exact, torch.Tensor]:
    role = Gaussian(SCHEDULES[name], torch.zeros(2, dtype=F64), torch.full((2,), C**2, dtype=F64), "v" if name == "vp"
                    else "velocity")
    sampler = sampler_of(stock_call(Inference(STEPS, noise=noise), SCHEDULES[name]), SCHEDULES[name], TEACHERS[name])
    step = Exact(3, 0, 0.0, "student", 0, torch.arange(COUNT))
    return role, sampler, step, step.integers("exit", STEPS)


def factor(schedule, t, r):
    """Of one DDIM step, which multiplies x - alpha m by it."""
    (a, s), (a_r, s_r) = ((schedule.alpha(u), schedule.sigma(u)) for u in (t, r))
    return (a_r * a * C**2 + s_r * s) / (a**2 * C**2 + s**2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_states_are_the_product_of_the_steps_and_the_landing_one_more(name):
    role, sampler, step, exit = setting(name)
    states = way(sampler, role, Condition(), step, (2,))
    prediction, r = stopped(sampler, role, Condition(), states, exit)
    times = torch.linspace(1, 0, STEPS + 1, dtype=F64)
    factors = factor(role.schedule, times[:-1], times[1:])
    products = torch.cat([torch.ones(1, dtype=F64), factors.cumprod(0)])
    start = step.normal("start", (2,))
    assert exit.unique().tolist() == list(range(STEPS)) and torch.allclose(prediction.t, times[exit], atol=1e-6)
    assert torch.allclose(r, times[exit + 1], atol=1e-6)
    assert torch.allclose(prediction.x_t, products[exit][:, None] * start, rtol=1e-5)
    assert torch.allclose(ddim_step(prediction, r), products[exit + 1][:, None] * start, rtol=1e-5)
    s = r + 0.3 * (prediction.t - r)                                     # anywhere within the step
    known = factor(role.schedule, prediction.t, s)[:, None] * prediction.x_t
    assert torch.allclose(ddim_step(prediction, s), known, rtol=1e-9)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_exit_for_all_is_backward_simulation(name, noise):
    role, sampler, step, _ = setting(name, noise)
    exit = torch.full((COUNT,), int(step.shared("exit") * STEPS))
    prediction, _ = stopped(sampler, role, Condition(), way(sampler, role, Condition(), step, (2,)), exit)
    assert torch.equal(prediction.x0, rollout(sampler, role, Condition(), step, (2,)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_gradient_is_that_of_the_last_prediction_alone(name):
    """x_0 of a student is b x_t at every time: of the state x_s = (alpha_s - q alpha_t) b x_t + q x_t its slope in b is
    (alpha_s - q alpha_t) x_t, where x_t, which holds b too, is held fixed."""
    _, sampler, step, exit = setting(name)
    schedule, b, calls = SCHEDULES[name], torch.tensor(0.7, dtype=F64, requires_grad=True), []

    class Student:
        def __call__(self, x_t, t, cond):
            calls.append(torch.is_grad_enabled())
            return Prediction(b * x_t, x_t, t, schedule, "x0")

    states = way(sampler, Student(), Condition(), step, (2,))
    prediction, r = stopped(sampler, Student(), Condition(), states, exit)
    assert calls == [False] * (STEPS - 1) + [True] and not prediction.x_t.requires_grad
    x_s = ddim_step(prediction, r)
    q = schedule.sigma(r) / schedule.sigma(prediction.t)
    known = ((schedule.alpha(r) - q * schedule.alpha(prediction.t))[:, None] * prediction.x_t).sum()
    assert torch.autograd.grad(x_s.sum(), b)[0].item() == pytest.approx(known.item(), rel=1e-9)


def test_what_is_not_asked_for_is_not_computed():
    role, sampler, step, _ = setting("flow")
    calls = []
    counted = lambda x, t, cond: calls.append(t) or role(x, t, cond)
    states = sampler.states(counted, step.normal("start", (2,)))
    first, second = next(states), next(states)
    assert len(calls) == 1 and torch.equal(first, step.normal("start", (2,))) and not torch.equal(first, second)
    assert len(list(states)) == STEPS - 1 and len(calls) == STEPS
    assert torch.equal(sampler(role, first), sampler.rollout(role, first, STEPS))
