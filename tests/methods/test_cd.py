"""Consistency distillation beyond its identities: the grid, the solver's order, what is served and what is refused."""
import pytest
import torch
from diffusers import DDIMScheduler

from stepdistill.diffusion.bridges import bridge
from stepdistill.diffusion.exact import Gaussian
from stepdistill.diffusion.schedule import VariancePreserving
from stepdistill.diffusion.solvers import heun
from stepdistill.methods.base import Follows, Frozen, Trained
from stepdistill.methods.consistency.cd import CD, Settings, grid

from ..diffusion.schedules import SCHEDULES
from .closed import STD, Teacher, batch
from .players import few_steps, moment, spelled

F64 = torch.float64


@pytest.mark.parametrize("name", ["vp", "vp-zero", "flow"])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_the_grid_holds_the_ends_and_the_times_that_the_student_is_asked_at(name, steps):
    asked = few_steps(steps, name.split("-")[0]).times
    times, schedule = grid(SCHEDULES[name], 40, asked), SCHEDULES[name]
    assert ((times.diff() < 0).all() and times[0] == (0.999 if (name, steps) == ("vp-zero", 3) else 1)
            and times[-1] == (0 if name == "flow" else 0.001))
    assert 32 <= len(times) <= 42 + steps and all((times == t).any() for t in asked)
    if name != "flow":                                                   # what an integer can tell the network
        assert torch.equal((1000 * times).round() / 1000, times)
    ratio = (schedule.sigma(times) / schedule.alpha(times)).clamp(0.002, 80)[1:-1]
    assert (ratio[1:] / ratio[:-1] > 0.4).all()                          # geometric, more or less: nothing is skipped


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_the_bridge_is_of_second_order_and_finite_at_the_ends(name):
    schedule = SCHEDULES[name]
    role = Gaussian(schedule, torch.zeros(2, dtype=F64), torch.full((2,), STD**2, dtype=F64), "v" if name == "vp"
                    else "velocity")
    x, t = torch.ones(3, 2, dtype=F64), torch.full((3,), 0.6, dtype=F64)
    s = t - torch.tensor([0.1, 0.05, 0.025], dtype=F64)
    error = (bridge(heun, role, x, t, s, None) - role.flow(x, t, s)).abs()[:, 0]
    assert (error[:-1] / error[1:] > 6.5).all()                          # a step of h is off by h^3
    ends = torch.tensor([1.0, 1.0, 0.3], dtype=F64), torch.tensor([0.9, 0.0, 0.0], dtype=F64)
    assert torch.isfinite(bridge(heun, role, x, *ends, None)).all()


def test_from_pure_noise_the_bridge_is_a_ddim_step():
    role = Gaussian(SCHEDULES["vp-zero"], torch.zeros(2), torch.full((2,), STD**2))
    x, t, s = torch.ones(1, 2), torch.ones(1, dtype=F64), torch.full((1,), 0.99, dtype=F64)
    assert torch.allclose(bridge(heun, role, x, t, s, None), role.schedule.sigma(s).float() * x, atol=1e-6)


def test_two_evaluations_of_the_teacher_one_of_the_target_without_gradient_one_of_the_student():
    asked = []

    class Asked(Teacher):
        def __init__(self, name):
            super().__init__(SCHEDULES["vp"], "v")
            self.name = name

        def __call__(self, x_t, t, cond):
            asked.append((self.name, torch.is_grad_enabled(), t))
            return super().__call__(x_t, t, cond)

    roles = {name: Asked(name) for name in ("teacher", "student", "target")}
    method = CD(Settings(nodes=18), roles, 1.0, few_steps(4))
    method.loss(batch(300), moment(300))
    assert [call[:2] for call in asked] == [("teacher", False)] * 2 + [("target", False), ("student", True)]
    (_, _, t), (_, _, inner), (_, _, s), (_, _, last) = asked
    assert torch.equal(t, last) and torch.equal(inner, s) and (s < t).all()
    assert torch.equal(t.unique().flip(0), method.grid[:-1]) and torch.equal(s.unique().flip(0), method.grid[1:])


def test_the_sampler_is_the_stock_one_at_times_of_the_grid():
    found = spelled(CD, Settings(), 4, "vp")
    assert found.scheduler == "LCMScheduler" and found.config["original_inference_steps"] == 4
    assert spelled(CD, Settings(), 4, "flow").call["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    schedule = VariancePreserving.of(DDIMScheduler().alphas_cumprod)
    assert 18 < len(grid(schedule, 18, few_steps(4).times)) <= 22


@pytest.mark.parametrize("wrong", [{"nodes": 1}, {"loss": "lpips"}, {"huber_c": 0.0}, {"target_decay": 1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize("full", [True, False])
def test_the_target_follows_an_adapter_too(full):
    assert CD.needs(Settings(target_decay=0.9), full) == {
        "teacher": Frozen(), "student": Trained("teacher"), "target": Follows("student", 0.9)}
