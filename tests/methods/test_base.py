import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stepdistill.diffusion.sampler import Sampler
from stepdistill.diffusion.times import trailing
from stepdistill.methods.base import DIVISORS, deterministic, equal_steps, middle, renoised
from stepdistill.models.schedulers import stock_scheduler

from .players import SCHEDULES

TEACHERS = {
    "vp": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),   # it clips, from "leading"
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, shift_terminal=0.1, use_karras_sigmas=True),
}


def sampler(steps: int, schedule: str, made=deterministic, **config) -> Sampler:
    found = made(steps, schedule)
    grid = {"sigmas": found.call["sigmas"]} if schedule == "flow" else {}
    return Sampler.of(stock_scheduler(found.scheduler, {**found.config, **config}, TEACHERS[schedule]), steps, SCHEDULES[schedule][0], **grid)


@pytest.mark.parametrize("schedule, steps", [*(("vp", k) for k in DIVISORS), *(("flow", k) for k in (1, 2, 3, 4, 7, 8, 50))])
def test_a_deterministic_sampler_takes_equal_steps_that_meet(schedule, steps):
    """Told time, level and the landing before are one number, from 1 down to 0."""
    made = sampler(steps, schedule)
    edges = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    told, level, landing = (torch.tensor([getattr(e, name) for e in made.evaluations]) for name in ("told", "level", "landing"))
    for found, known in [(told, edges[:-1]), (level, edges[:-1]), (landing, edges[1:])]:
        torch.testing.assert_close(found.double(), known, rtol=0, atol=1e-5)
    assert made.start == 1 and not made.stochastic and landing[-1] == 0
    assert deterministic(steps, schedule).call["guidance_scale"] == 1


def test_other_numbers_of_steps_are_refused_with_what_would_be_right():
    for steps, near in [(3, "2 or 4"), (6, "5 or 8"), (7, "5 or 8"), (999, "500 or 1000"), (1001, "1000")]:
        with pytest.raises(ValueError, match=f"found {steps}, and {near} would be right"):
            deterministic(steps, "vp")
    for schedule in TEACHERS:
        with pytest.raises(ValueError, match="at least 1 step; found 0"):
            deterministic(0, schedule)


def test_the_refused_numbers_land_elsewhere_than_the_network_is_told():
    """3 steps: the second lands at time 333, and the third is told 332."""
    scheduler = stock_scheduler("DDIMScheduler", deterministic(4, "vp").config, TEACHERS["vp"])
    rows = Sampler.of(scheduler, 3, SCHEDULES["vp"][0]).evaluations
    assert round(1000 * rows[1].landing - 1, 3) == 333 and round(1000 * rows[2].told - 1) == 332


@pytest.mark.parametrize("schedule, steps", [*(("vp", k) for k in (1, 3, 8, 16, 32, 64, 80, 500)), *(("flow", k) for k in (1, 3, 16))])
def test_any_number_of_equal_steps_meets_at_the_trailing_times_which_the_doubled_grid_holds(schedule, steps):
    made, s = sampler(steps, schedule, equal_steps), SCHEDULES[schedule][0]
    edges = trailing(steps, s)
    told, level, landing = (torch.tensor([getattr(e, name) for e in made.evaluations]) for name in ("told", "level", "landing"))
    for found, known in [(told, edges[:-1]), (level, edges[:-1]), (landing, edges[1:])]:
        torch.testing.assert_close(found.double(), known, rtol=0, atol=1e-5)
    assert torch.equal(trailing(2 * steps, s)[::2], edges) and landing[-1] == 0
    assert made.start == pytest.approx(1 if schedule == "flow" or 1000 % steps == 0 else (1 - 0.00466) ** 0.5, abs=1e-5)


def test_equal_steps_tell_a_scale_and_are_refused_where_there_are_no_times():
    assert equal_steps(16, "vp", 2.5).call == {"num_inference_steps": 16, "guidance_scale": 2.5}
    assert equal_steps(4, "vp", 2.5).call["guidance_scale"] == 2.5 and equal_steps(4, "vp").call["guidance_scale"] == 1
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"found {steps}"):
            equal_steps(steps, "vp")
    assert middle(3) == 3.0 and middle((1.0, 4.0)) == 2.5


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_renoised_flow_is_asked_at_equal_steps_whatever_the_teacher_s_grid(steps):
    """The teacher's own grid is shifted, dynamic, terminal and Karras's."""
    made = sampler(steps, "flow", renoised)
    assert made.times.tolist() == pytest.approx([1 - i / steps for i in range(steps)], abs=1e-6) and made.stochastic == (steps > 1)
