from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler
from torch import Tensor

from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.draws import Step
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.sampler import Sampler
from stepdistill.diffusion.schedule import RectifiedFlow, Schedule, like
from stepdistill.methods import METHODS, load_method
from stepdistill.methods.base import Follows, Frozen, Trained
from stepdistill.methods.consistency.lcm import LCM, Settings
from stepdistill.models.schedulers import stock_scheduler

from .closed import SCHEDULES, STD, Teacher, batch, contraction, guided_mean, predict, stable_diffusion
from .players import spelled


@dataclass
class FixedPoint:
    """The student at which the loss vanishes: f(x, t) = m_w + prod k (x - alpha_t m_w), through LCM's boundary
    scalings. On a flow f is x_0."""

    schedule: Schedule
    kind: str
    scale: Callable[[Condition], float | Tensor]
    nodes: int = 50
    skip: int = 1

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        m = guided_mean(cond, self.scale(cond))
        f = m + like(contraction(self.schedule, t, self.nodes, self.skip),
                     x_t) * (x_t - like(self.schedule.alpha(t), x_t) * m)
        scaled = 10 * (1000 * t - 1)
        flow = isinstance(self.schedule, RectifiedFlow)
        c_skip, c_out = (0 * t, 1 + 0 * t) if flow else (0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt())
        return predict((f - like(c_skip, x_t) * x_t) / like(c_out, x_t), x_t, t, self.schedule, self.kind)


def loss(student, guidance, settings: Settings, count: int = 256, schedule: str = "vp", **roles) -> float:
    teacher = Teacher(*SCHEDULES[schedule])
    method = LCM(settings, {"teacher": teacher, "student": student} | roles, guidance, None)
    data = batch(count)
    step = Step(seed=0, index=0, progress=0.0, update="student", repeat=0, ids=data.ids)
    return method.loss(data, step)["consistency"].item()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("nodes, skip", [(50, 3), (10, 10)])
def test_the_discrete_fixed_point_is_that_of_skipped_nodes(schedule, nodes, skip):
    settings = Settings(nodes=nodes, skip=skip, loss="squared")
    student = FixedPoint(*SCHEDULES[schedule], lambda cond: 3.0, nodes, skip)
    assert loss(student, 3.0, settings, schedule=schedule) < 1e-20
    exact = FixedPoint(*SCHEDULES[schedule], lambda cond: 3.0, 2 * nodes, skip)        # a finer grid is another map
    assert loss(exact, 3.0, settings, schedule=schedule) > 1e-9


def test_the_fixed_point_is_the_grid_s_and_not_the_flow_map():
    """Standard deviation 0.6 at the last time: the exact flow map shrinks by 0.6 / sqrt(0.36 alpha^2 + sigma^2)."""
    t, schedule = torch.ones(1, dtype=torch.float64), stable_diffusion()
    exact = STD / (schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2).sqrt().item()
    gaps = [exact - contraction(schedule, t, nodes).item() for nodes in (50, 100, 200, 1000)]
    assert exact == pytest.approx(0.6009, abs=1e-4) and gaps[0] == pytest.approx(0.0300, abs=1e-4)
    assert all(later < 0.75 * earlier for earlier, later in pairwise(gaps))


def test_a_told_student_hears_the_scale_that_guided_the_teacher():
    embedded = Settings(loss="squared", guidance_embedding=True)
    scales = []

    def hear(cond: Condition) -> Tensor:
        scales.append(cond.w)
        return cond.w

    # w reaches networks in float32
    assert loss(FixedPoint(*SCHEDULES["vp"], hear), (2.0, 6.0), embedded) < 1e-12
    assert loss(FixedPoint(*SCHEDULES["vp"], lambda cond: cond.w + 1), (2.0, 6.0), embedded) > 1e-4
    student, target = scales
    assert torch.equal(student, target) and student.min() >= 2 and student.max() < 6 and student.std() > 1
    assert loss(FixedPoint(*SCHEDULES["vp"], lambda cond: cond.w), 3.0, embedded) < 1e-12


def test_an_untold_student_sees_no_scale_and_the_range_is_averaged():
    def scale(cond: Condition) -> float:
        assert cond.w is None
        return 4.0
    assert loss(FixedPoint(*SCHEDULES["vp"], scale), (2.0, 6.0), Settings(loss="squared")) > 1e-5


def test_without_the_anchor_constants_would_be_optimal():
    """A student that collapses is punished at s = 0 alone: with one node always, with fifty on a fiftieth of the
    draws."""
    @dataclass
    class Collapsed:
        schedule: Schedule = SCHEDULES["vp"][0]

        def __call__(self, x_t, t, cond):
            return predict(torch.zeros_like(x_t), x_t, t, self.schedule, "v")

    assert loss(Collapsed(), 1.0, Settings(nodes=1, loss="squared")) > 0.1
    assert 1e-3 < loss(Collapsed(), 1.0, Settings(loss="squared"), count=1000) < 0.1


def test_the_target_role_is_asked_without_gradient_and_with_the_same_condition():
    asked = []

    @dataclass
    class Spy:
        name: str
        inner: FixedPoint

        @property
        def schedule(self):
            return self.inner.schedule

        def __call__(self, x_t, t, cond):
            asked.append((self.name, torch.is_grad_enabled(), cond, t))
            return self.inner(x_t, t, cond)

    point = FixedPoint(*SCHEDULES["vp"], lambda cond: cond.w)
    settings = Settings(loss="squared", guidance_embedding=True)
    assert loss(Spy("student", point), (1.0, 4.0), settings, target=Spy("target", point)) < 1e-12
    (first, no_grad, target_cond, s), (second, grad, cond, t) = asked
    assert (first, no_grad, second, grad) == ("target", False, "student", True)
    assert target_cond is cond and torch.allclose((t - s)[t > 0.021], torch.tensor(0.02, dtype=torch.float64))


@pytest.mark.parametrize("steps, timesteps", [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259]), (8, None),
                                              (50, None)])
def test_sampling_times_are_training_nodes(steps, timesteps):
    inference = spelled(LCM, Settings(), steps, "vp", 3.0)
    scheduler = LCMScheduler.from_config(DDIMScheduler(beta_schedule="scaled_linear").config, **inference.config)
    scheduler.set_timesteps(inference.call["num_inference_steps"])
    assert timesteps is None or scheduler.timesteps.tolist() == timesteps
    assert (set(scheduler.timesteps.tolist()) <= {20 * (i + 1) - 1 for i in range(50)}
            and len(scheduler.timesteps) == steps)
    assert not scheduler.config.clip_sample                # DDIM's default would clip latents


def test_the_call():
    assert spelled(LCM, Settings(), 4, "vp", (2.0, 6.0)).call == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert spelled(LCM, Settings(guidance_embedding=True), 4, "vp", (2.0, 6.0)).call["guidance_scale"] == 4.0
    for steps, schedule in [(0, "vp"), (51, "vp"), (0, "flow"), (51, "flow")]:
        with pytest.raises(ValueError, match="lcm"):
            spelled(LCM, Settings(), steps, schedule)
    for wrong in (Settings(nodes=30), Settings(shift=3.0)):
        with pytest.raises(ValueError, match=f"nodes = {wrong.nodes}, shift = {wrong.shift}"):
            spelled(LCM, wrong, 4, "vp")


@pytest.mark.parametrize("nodes, steps, shift", [(50, 1, 1.0), (50, 4, 1.0), (10, 4, 3.0), (7, 3, 3.0), (8, 8, 1.0),
                                                 (16, 4, 1.0)])
def test_sampling_times_of_a_flow_are_training_nodes(nodes, steps, shift):
    """The stock scheduler of a teacher with another shift, as a pipeline would call it."""
    settings = Settings(nodes=nodes, shift=shift)
    inference = spelled(LCM, settings, steps, "flow", 3.0)
    scheduler = stock_scheduler(inference.scheduler, inference.config, FlowMatchEulerDiscreteScheduler(shift=2.0))
    assert type(scheduler) is FlowMatchLCMScheduler
    assert (inference.call["num_inference_steps"] == len(inference.call["sigmas"]) == steps
            and inference.call["guidance_scale"] == 1.0)
    times = Sampler.of(scheduler, steps, RectifiedFlow(), sigmas=inference.call["sigmas"]).times
    method = LCM(settings, {"teacher": None, "student": None}, 1.0, steps)
    trained, _ = method.times(Step(seed=0, index=0, progress=0.0, update="student", repeat=0, ids=torch.arange(400)))
    assert times[0] == 1 and (times[:, None] - trained).abs().amin(1).max() < 1e-6 and len(trained.unique()) == nodes
    if nodes % steps == 0 and shift == 1:
        assert torch.allclose(times, torch.linspace(1, 1 / steps, steps, dtype=torch.float64), atol=1e-6)


def test_shifted_nodes_keep_their_fixed_point():
    settings, point = Settings(nodes=4, shift=3.0, loss="squared"), FixedPoint(*SCHEDULES["flow"], lambda cond: 3.0, 4)
    shifted = lambda u: 3 * u / (1 + 2 * u)
    fine = RectifiedFlow(shift=3.0)

    @dataclass
    class Shifted(FixedPoint):
        """The fixed point of uniform nodes on the shifted schedule, told the times of the straight one."""

        def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
            p = FixedPoint(fine, "velocity", self.scale, 4)(x_t, t / (3 - 2 * t), cond)
            return predict(p.x0, x_t, t, self.schedule, self.kind)

    assert torch.allclose(shifted(torch.tensor(0.25)), torch.tensor(0.5))
    assert loss(Shifted(*SCHEDULES["flow"], lambda cond: 3.0, 4), 3.0, settings, schedule="flow") < 1e-20
    assert loss(point, 3.0, settings, schedule="flow") > 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_on_the_data_s_path_no_teacher_is_asked_and_the_scale_is_still_told(schedule):
    """With one node the path ends at the data, and the loss is a denoiser's: its least value is the variance of x_0
    given x_t."""
    def asked(*_):
        raise AssertionError("the teacher was asked")

    told = []
    point = FixedPoint(*SCHEDULES[schedule], lambda cond: told.append(cond.w) or 1.0, 1)
    settings = Settings(nodes=1, loss="squared", bridge="data", guidance_embedding=True)
    found = loss(point, (2.0, 6.0), settings, 4000, schedule, teacher=asked)
    a, s = (f(torch.ones(1, dtype=torch.float64)).item()
            for f in (SCHEDULES[schedule][0].alpha, SCHEDULES[schedule][0].sigma))
    assert found == pytest.approx(STD**2 * s**2 / (a**2 * STD**2 + s**2), rel=0.05) and told[-1].std() > 1


def test_the_data_s_path_has_nothing_to_guide():
    with pytest.raises(ValueError, match="bridge: data.*guidance be 1.*found guidance 3.0"):
        spelled(LCM, Settings(bridge="data"), 4, "vp", 3.0)
    assert spelled(LCM, Settings(bridge="data"), 4, "vp", 1.0).call["guidance_scale"] == 1.0
    assert spelled(LCM, Settings(bridge="data", guidance_embedding=True), 4, "vp", 3.0).call["guidance_scale"] == 3.0


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"shift": 0.0}, {"skip": 0}, {"skip": 51}, {"loss": "l1"},
                                   {"huber_c": 0.0},
                                   {"target_decay": 1.0}, {"bridge": "heun"}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_needs_are_those_of_the_table():
    assert load_method("lcm") is LCM
    assert LCM.needs(Settings(), full=True) == {"teacher": Frozen(), "student": Trained("teacher"),
                                                "target": Follows("student", 0.95)}
    assert LCM.needs(Settings(guidance_embedding=True), full=False) == {"teacher": Frozen(),
                                                                        "student": Trained("teacher", reads=("w",))}
    assert METHODS["lcm"].needs == tuple(LCM.needs(Settings(), full=True)) and METHODS["lcm"].data == LCM.data
