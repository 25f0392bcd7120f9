"""TCD beyond its identities: the law of r, what a network that is not told r can learn, and the call of the
pipeline."""
import pytest
import torch
from diffusers import TCDScheduler

from stepdistill.diffusion.flow_map import flow_map
from stepdistill.diffusion.sampler import Sampler
from stepdistill.methods.base import Follows, Frozen, Trained
from stepdistill.methods.consistency.tcd import TCD, Settings
from stepdistill.models.schedulers import StockCall, stock_scheduler

from .closed import SCHEDULES, Teacher, batch
from .players import TEACHERS, moment, spelled

F64 = torch.float64


def made(settings: Settings, schedule: str, steps: int = 4, **roles) -> TCD:
    found = spelled(TCD, settings, steps, schedule)
    sampler = Sampler.of_call(stock_scheduler(found.scheduler, found.config, TEACHERS[schedule]), steps,
                              SCHEDULES[schedule][0], found.call)
    teacher = Teacher(*SCHEDULES[schedule])
    return TCD(settings, {"teacher": teacher, "student": teacher} | roles, 1.0, sampler)


@pytest.mark.parametrize("skip", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_r_is_uniform_on_the_nodes_from_the_data_to_s(schedule, skip):
    method = made(Settings(nodes=5, skip=skip, gamma=0.0), schedule)
    t, s, r = method.times(moment(6000))
    end = 0.001 if schedule == "vp" else 0.0
    for i in range(1, 6):
        landings = [end, 0.2, 0.4, 0.6, 0.8][:max(i - skip, 0) + 1]
        mine = (t - i / 5).abs() < 1e-9
        assert mine.sum() > 1000 and torch.allclose(s[mine], torch.tensor(landings[-1], dtype=F64))
        found = torch.stack([(r[mine] - landing).abs() < 1e-9 for landing in landings]).double().mean(1)
        assert torch.allclose(found.sum(), torch.ones((), dtype=F64)) and (found - 1 / len(landings)).abs().max() < 0.06


def test_shifted_nodes():
    t, s, r = made(Settings(nodes=4, gamma=0.0, shift=3.0), "flow").times(moment(500))
    nodes = [0, 0.5, 0.75, 0.9, 1]
    assert all(min(abs(u - n) for n in nodes) < 1e-9 for u in torch.cat([t, s, r]).tolist())
    assert torch.allclose(made(Settings(nodes=4, gamma=0.0, shift=3.0), "flow").sampler.times,
                          torch.tensor([1, 0.9, 0.75, 0.5], dtype=F64))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_where_r_is_s_the_target_is_the_teacher_s_step_itself(schedule):
    role = Teacher(*SCHEDULES[schedule])
    data, s = batch(64), torch.full((64,), 0.4, dtype=F64)
    assert torch.allclose(flow_map(role, data.x0, s, s, data.cond), data.x0, rtol=1e-12)


def test_one_network_cannot_land_on_every_r_and_its_best_is_between():
    """From t = 1 with two nodes: to r = 1/2 the teacher's x_0 is right, to the end that of two steps. Alone each is
    attained, together the loss has a floor."""
    class Mixed(Teacher):
        share = 0.0

        def __call__(self, x_t, t, cond):
            p = super().__call__(x_t, t, cond)
            if not (t == 1).all():
                return p
            half = torch.full_like(t, 0.5)
            two = super().__call__(flow_map(self.teacher, x_t, t, half, cond), half, cond).x0
            # a velocity at t = 1: x_t - x_0
            return type(p)(p.raw - self.share * (two - p.x0), x_t, t, p.schedule, p.kind)

    student = Mixed(*SCHEDULES["flow"])
    student.teacher = Teacher(*SCHEDULES["flow"])
    data, settings = batch(256), Settings(nodes=2, gamma=0.0)
    method = made(settings, "flow", 1, student=student)
    losses = {}
    for share in (0.0, 0.5, 1.0):
        student.share = share
        for r in (0.0, 0.5):
            method.times = lambda step: tuple(torch.full((256,), u, dtype=F64) for u in (1.0, 0.5, r))
            losses[share, r] = method.loss(data, moment(256))["consistency"].item()
    assert losses[0.0, 0.5] < 1e-20 and losses[1.0, 0.0] < 1e-20
    assert min(losses[0.0, 0.0], losses[1.0, 0.5]) > 1e-4 and min(losses[0.5, 0.0], losses[0.5, 0.5]) > 1e-5


def test_the_call_says_eta_and_the_sampler_ends_where_the_targets_do():
    found = spelled(TCD, Settings(), 4, "vp")
    assert found == StockCall("TCDScheduler", {"original_inference_steps": 50},
                              {"num_inference_steps": 4, "guidance_scale": 1.0, "eta": 0.2})
    method = made(Settings(), "vp")
    assert method.sampler.stochastic and method.end == 0.001 == pytest.approx(method.sampler.evaluations[-1].landing,
                                                                              abs=1e-7)
    assert method.sampler.times.tolist() == pytest.approx([1.0, 0.76, 0.5, 0.26])
    scheduler = stock_scheduler(found.scheduler, found.config, TEACHERS["vp"])
    assert type(scheduler) is TCDScheduler and scheduler.config.original_inference_steps == 50


@pytest.mark.parametrize("gamma, scheduler, stochastic", [(0.0, "FlowMatchEulerDiscreteScheduler", False),
                                                          (1.0, "FlowMatchLCMScheduler", True)])
def test_a_flow_is_served_at_both_ends_of_gamma(gamma, scheduler, stochastic):
    settings = Settings(nodes=8, gamma=gamma)
    assert spelled(TCD, settings, 4, "flow").scheduler == scheduler
    method = made(settings, "flow")
    assert method.end == 0 and method.sampler.stochastic == stochastic
    assert torch.allclose(method.sampler.times, torch.tensor([1, 0.75, 0.5, 0.25], dtype=F64))


@pytest.mark.parametrize("settings, steps, schedule, says", [
    (Settings(), 4, "flow", "gamma: 0, none, or 1, all of it; found 0.2"), (Settings(), 51, "vp", "1 to 50 steps"),
    (Settings(), 0, "vp", "1 to 50 steps"), (Settings(nodes=30), 4, "vp", "divide 1000.*nodes = 30"),
    (Settings(shift=3.0), 4, "vp", "no shift")])
def test_what_no_scheduler_serves_is_refused(settings, steps, schedule, says):
    with pytest.raises(ValueError, match=says):
        spelled(TCD, settings, steps, schedule)


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"skip": 51}, {"gamma": 1.5}, {"gamma": -0.1}, {"loss": "l1"},
                                   {"huber_c": 0.0},
                                   {"target_decay": 1.0}, {"shift": 0.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_a_target_of_its_own_where_all_weights_are_trained():
    assert TCD.needs(Settings(), False) == {"teacher": Frozen(), "student": Trained("teacher")}
    assert TCD.needs(Settings(), True)["target"] == Follows("student", 0.95)
