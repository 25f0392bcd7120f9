from dataclasses import fields

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stepdistill.diffusion.sampler import Sampler
from stepdistill.diffusion.times import trailing
from stepdistill.methods import METHODS, load_method
from stepdistill.methods.base import COUNTS, MOST, Inference, Update, middle
from stepdistill.models.schedulers import DIVISORS, StockCall, sampler_of, stock_call, stock_scheduler
from stepdistill.models.stock import Guidance

from .closed import predict
from .players import SCHEDULES

TEACHERS = {
    # it clips, from "leading"
    "vp": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, shift_terminal=0.1,
                                            use_karras_sigmas=True),
}


def stock(schedule: str, *args, **fields) -> StockCall:
    return stock_call(Inference(*args, **fields), SCHEDULES[schedule][0], Guidance(embedded="guidance_scale"))


def sampler(schedule: str, steps: int, **fields) -> Sampler:
    return sampler_of(stock(schedule, steps, **fields), SCHEDULES[schedule][0], TEACHERS[schedule])


@pytest.mark.parametrize("schedule, steps",
                         [*(("vp", k) for k in DIVISORS), *(("flow", k) for k in (1, 2, 3, 4, 7, 8, 50))])
def test_a_deterministic_sampler_takes_equal_steps_that_meet(schedule, steps):
    """Told time, level and the landing before are one number, from 1 down to 0."""
    made = sampler(schedule, steps)
    edges = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    time, level, landing = (torch.tensor([getattr(e, name) for e in made.evaluations])
                            for name in ("time", "level", "landing"))
    for found, known in [(time, edges[:-1]), (level, edges[:-1]), (landing, edges[1:])]:
        torch.testing.assert_close(found.double(), known, rtol=0, atol=1e-5)
    assert made.start == 1 and not made.stochastic and landing[-1] == 0
    assert stock(schedule, steps).call["guidance_scale"] == 1


def test_other_numbers_of_steps_are_refused_with_what_would_be_right():
    for steps, near in [(3, "2 or 4"), (6, "5 or 8"), (7, "5 or 8"), (999, "500 or 1000"), (1001, "1000")]:
        with pytest.raises(ValueError, match=f"found {steps}, and {near} would be right"):
            stock("vp", steps)
    for schedule in TEACHERS:
        with pytest.raises(ValueError, match="at least 1 step; found 0"):
            stock(schedule, 0)


def test_the_refused_numbers_land_elsewhere_than_the_network_is_told():
    """3 steps: the second lands at time 333, and the third is told 332."""
    scheduler = stock_scheduler("DDIMScheduler", stock("vp", 4).config, TEACHERS["vp"])
    rows = Sampler.of(scheduler, 3, SCHEDULES["vp"][0]).evaluations
    assert round(1000 * rows[1].landing - 1, 3) == 333 and round(1000 * rows[2].time - 1) == 332


@pytest.mark.parametrize("schedule, steps", [*(("vp", k) for k in (1, 3, 8, 16, 32, 64, 80, 500)),
                                             *(("flow", k) for k in (1, 3, 16))])
def test_any_number_of_equal_steps_meets_at_the_trailing_times_which_the_doubled_grid_holds(schedule, steps):
    made, s = sampler(schedule, steps, exact_grid=False), SCHEDULES[schedule][0]
    edges = trailing(steps, s)
    time, level, landing = (torch.tensor([getattr(e, name) for e in made.evaluations])
                            for name in ("time", "level", "landing"))
    for found, known in [(time, edges[:-1]), (level, edges[:-1]), (landing, edges[1:])]:
        torch.testing.assert_close(found.double(), known, rtol=0, atol=1e-5)
    assert torch.equal(trailing(2 * steps, s)[::2], edges) and landing[-1] == 0
    assert made.start == pytest.approx(1 if schedule == "flow" or 1000 % steps == 0 else (1 - 0.00466) ** 0.5, abs=1e-5)


def test_equal_steps_tell_a_scale_and_are_refused_where_there_are_no_times():
    assert stock("vp", 16, guidance=2.5, exact_grid=False).call == {"num_inference_steps": 16, "guidance_scale": 2.5}
    assert (stock("vp", 4, guidance=2.5, exact_grid=False).call["guidance_scale"] == 2.5
            and stock("vp", 4, exact_grid=False).call["guidance_scale"] == 1)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"found {steps}"):
            stock("vp", steps, exact_grid=False)
    assert middle(3) == 3.0 and middle((1.0, 4.0)) == 2.5


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_renoised_flow_is_asked_at_equal_steps_whatever_the_teacher_s_grid(steps):
    """The teacher's own grid is shifted, dynamic, terminal and Karras's."""
    made = sampler("flow", steps, noise=1.0)
    assert (made.times.tolist() == pytest.approx([1 - i / steps for i in range(steps)], abs=1e-6)
            and made.stochastic == (steps > 1))


@pytest.mark.parametrize("schedule, fields, says", [
    ("vp", {"shift": 3.0}, "not shifted; found shift = 3"), ("vp", {"noise": 0.3}, "share of fresh noise"),
    ("vp", {"nodes": 8}, "finer"),
    ("vp", {"end": 0.1, "noise": 0.3}, "TCDScheduler ends"), ("vp", {"times": (0.6, 0.3)}, "LCMScheduler alone takes"),
    ("flow", {"noise": 0.3}, "FlowMatchEulerDiscreteScheduler adds none, FlowMatchLCMScheduler all of it; found 0.3"),
    ("flow", {"end": 0.001}, "end on the data")])
def test_an_inference_that_no_stock_scheduler_does_is_refused(schedule, fields, says):
    with pytest.raises(ValueError, match=says):
        stock(schedule, 2, **fields)


def test_times_of_its_own_reach_the_call():
    """One step from t = 0.626, the time that a network is told as 625, and sigmas as they are."""
    found = stock("vp", 1, noise=1.0, times=(0.626,))
    assert found.call["timesteps"] == [625] and found.scheduler == "LCMScheduler"
    assert sampler("vp", 1, noise=1.0, times=(0.626,)).times.tolist() == pytest.approx([0.626])
    assert stock("flow", 2, times=(0.9, 0.4)).call["sigmas"] == [0.9, 0.4]
    assert sampler("flow", 2, times=(0.9, 0.4)).times.tolist() == pytest.approx([0.9, 0.4])


STARTED = [name for name in METHODS if "start_time" in vars(load_method(name).Settings())]


def begun(name: str, schedule: str, time: float | None, steps: int = 1) -> StockCall:
    kind, found = load_method(name), SCHEDULES[schedule][0]
    return stock_call(kind.inference(kind.Settings(start_time=time), steps, found), found)


def test_who_begins_in_pure_noise_may_begin_below_its_time():
    assert STARTED == ["diff_instruct", "dmd", "dmd2", "f_distill", "sid", "swiftbrush", "disback",
                       "uni_instruct", "smd", "diff_ratio", "em_distillation"]


@pytest.mark.parametrize("name", STARTED)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_begins_at_start_time_with_unit_noise_in_training_as_in_the_stock_scheduler(name, schedule):
    found, s = begun(name, schedule, 0.626), SCHEDULES[schedule][0]
    assert found.call == {"num_inference_steps": 1, "guidance_scale": 1.0} | ({"timesteps": [625]} if schedule == "vp"
                                                                              else {"sigmas": [0.626]})
    ours = sampler_of(found, s, TEACHERS[schedule])
    assert ours.start == 1 and ours.times.tolist() == pytest.approx([0.626]) and ours.landings.tolist() == [0]
    asked, noise = [], torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def network(x: torch.Tensor, t: torch.Tensor, cond=None):
        asked.append((x, t))
        return predict((0.3 * x + 1).double(), x.double(), t, s, SCHEDULES[schedule][1])

    sampled, simulated = ours(network, noise), ours.simulate(network, noise, 0)
    scheduler = stock_scheduler(found.scheduler, found.config, TEACHERS[schedule])
    scheduler.register_to_config(prediction_type="v_prediction") if schedule == "vp" else None
    scheduler.set_timesteps(**{name: value for name, value in found.call.items() if name in ("timesteps", "sigmas")})
    (time,) = scheduler.timesteps
    assert time.item() == pytest.approx(625 if schedule == "vp" else 626)
    stepped = scheduler.step(network(noise, torch.full((5,), 0.626, dtype=torch.float64)).raw, time, noise,
                             return_dict=False)[0]
    for made in (sampled, simulated, stepped):
        torch.testing.assert_close(made.double(), 0.3 * noise.double() + 1, atol=1e-5, rtol=0)
    assert all(torch.equal(x, noise) and t.tolist() == pytest.approx([0.626] * 5) for x, t in asked)


@pytest.mark.parametrize("name", STARTED)
def test_without_a_start_time_the_first_time_is_the_grid_s(name):
    assert begun(name, "vp", None).call == {"num_inference_steps": 1, "guidance_scale": 1.0}
    assert begun(name, "flow", None).call["sigmas"] == [1.0]
    for wrong in (0.0, 0.0005, 1.1, -0.4):
        with pytest.raises(ValueError, match=f"start_time must be a time from 0.001.*to 1; found {wrong}"):
            begun(name, "vp", wrong)
    with pytest.raises(ValueError, match="takes no times.*asks for 0.4"):
        stock_call(load_method(name).inference(load_method(name).Settings(start_time=0.4), 1, SCHEDULES["flow"][0]),
                   SCHEDULES["flow"][0],
                   sigmas=False)


@pytest.mark.parametrize("name", ["dmd2", "sid"])
def test_more_steps_begin_at_the_end_of_noise(name):
    with pytest.raises(ValueError, match="begins at t = 1: leave it out; found start_time = 0.4 and 4 steps"):
        begun(name, "vp", 0.4, 4)


def test_a_pipeline_without_a_guidance_embedding_is_called_without_guidance():
    found = stock_call(Inference(4, guidance=5.0), SCHEDULES["flow"][0], Guidance("cfg", 1, off={"other": 1}))
    assert found.call == {"num_inference_steps": 4, "cfg": 0, "other": 1, "sigmas": [1.0, 0.75, 0.5, 0.25]}


def test_an_update_is_due_since_its_first_step_and_every_so_many():
    due = lambda **when: [step for step in range(8) if Update(("student",), None, **when).due(step)]
    assert due() == [*range(8)] and due(since=3) == [3, 4, 5, 6, 7] and due(every=2, since=3) == [4, 6]


@pytest.mark.parametrize("method", METHODS)
def test_counts_within_a_step_have_an_end(method):
    kind = load_method(method).Settings
    for name in {field.name for field in fields(kind)} & {*COUNTS}:
        for wrong in (0, MOST + 1):
            with pytest.raises(ValueError, match=rf"{name} must be at least \d.*; found {wrong}\b"):
                kind(**{name: wrong})


@pytest.mark.parametrize(("method", "settings", "count"), [
    ("boot", {"nodes": 1001}, 1001), ("boot", {"nodes": 40, "solver_steps": 26}, 1040),
    ("mlcm", {"stage": "whole", "ends": 8, "bridge_steps": 126}, 1008),
    ("mlcm", {"nodes": 1001}, 1001)])
def test_a_discrete_teacher_is_told_no_time_below_its_first(method, settings, count):
    """Where its network would be told less than 0. A flow has times between any two."""
    cls = load_method(method)
    with pytest.raises(ValueError, match=f"{method} asks a variance-preserving teacher at {count:,} even times, and it "
                       "has 1000: take fewer nodes"):
        cls.inference(cls.Settings(**settings), 1, SCHEDULES["vp"][0])
    assert cls.inference(cls.Settings(**settings), 1, SCHEDULES["flow"][0]).steps == 1


@pytest.mark.parametrize("wrong", [{"noise_rate": 1e-7}, {"noise_rate": 0.0}, {"noise_rate": 1.1}])
def test_a_chain_has_noise(wrong):
    """Below, 1 - (1 - g_e)^n, by which its drift is divided, is 0 to rounding."""
    kind = load_method("em_distillation").Settings
    with pytest.raises(ValueError, match=r"noise_rate must be from 1e-06 to 1, .*; found"):
        kind(**wrong)
    assert 1 - (1 - kind(noise_rate=1e-6).noise_rate) ** 8 == pytest.approx(8e-6, rel=1e-5)


@pytest.mark.parametrize("method", ["scm", "rcm", "sana_sprint"])
@pytest.mark.parametrize("wrong", [{"damping": 1e-300}, {"width": 1e-300}])
def test_what_a_tangent_is_divided_by_is_no_zero_of_float32(method, wrong):
    with pytest.raises(ValueError, match="damping and width at least 1e-06, below which float32 divides by 0; found"):
        load_method(method).Settings(**wrong)
