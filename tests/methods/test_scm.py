from dataclasses import dataclass
from math import atan, pi, tan

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from stepdistill.diffusion.continuous import TRIG, latest, start, trig_time
from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.draws import Step
from stepdistill.diffusion.guidance import self_guided
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import VariancePreserving
from stepdistill.diffusion.views import viewed
from stepdistill.losses.tangent import RADIAN, exact, trig_difference
from stepdistill.methods.base import Frozen, Trained
from stepdistill.methods.consistency.scm import SCM, Settings
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.teacher import load_teacher

from .closed import SCHEDULES, STD, Teacher, batch, guided_mean, predict
from .players import spelled

EXACT, SECANT, PAIR = Settings(derivative="exact"), Settings(derivative="difference"), Settings()


def moment(count: int, progress: float = 1.0) -> Step:
    return Step(seed=0, index=0, progress=progress, update="student", repeat=0, ids=torch.arange(count))


@dataclass
class FlowMap:
    """Believes in the end of the teacher's trajectory at scale w: m + STD / sqrt(alpha^2 STD^2 + sigma^2) (x_t - alpha
    m)."""

    name: str
    w: float

    @property
    def schedule(self):
        return SCHEDULES[self.name][0]

    def __call__(self, x_t, t, cond) -> Prediction:
        s, kind = SCHEDULES[self.name]
        alpha, sigma, m = s.alpha(t)[:, None], s.sigma(t)[:, None], guided_mean(cond, self.w)
        return predict(m + STD / (alpha**2 * STD**2 + sigma**2).sqrt() * (x_t - alpha * m), x_t, t, s, kind)


def loss(student, settings: Settings, name: str, guidance=3.0, progress: float = 1.0) -> float:
    method = SCM(settings, {"teacher": Teacher(*SCHEDULES[name]), "student": student}, guidance, None)
    return method.loss(batch(128), moment(128, progress))["consistency"].item()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_flow_map_is_at_rest_once_the_tangent_is_whole(name):
    student = FlowMap(name, 3.0)
    assert loss(student, EXACT, name) < 1e-20 < 1e-4 < loss(FlowMap(name, 2.0), EXACT, name)
    assert loss(student, Settings(derivative="exact", warmup=0), name, progress=0) < 1e-20
    grown = [loss(student, EXACT, name, progress=progress) for progress in (0.0, 0.05, 0.0999, 0.1)]
    assert grown[0] > grown[1] > grown[2] > 1e-12 > grown[3]


@pytest.mark.parametrize("name", SCHEDULES)
def test_differences_stay_close_to_the_flow_map(name):
    """The error of the tangent is of the order of the width, of a pair's of its square."""
    for by, low, high in (("difference", 3, 4.5), ("pair", 9, 20)):
        wide, narrow, wrong = (loss(FlowMap(name, w), Settings(derivative=by, width=width), name)
                               for w, width in ((3.0, 0.02), (3.0, 0.01), (2.0, 0.02)))
        assert wide < 0.02 * wrong and low < wide / narrow < high, (by, wide / narrow)


def test_a_range_of_scales_is_averaged_and_nobody_is_told():
    """The closed teacher refuses to be told w; a student of the middle is not at rest."""
    assert loss(FlowMap("vp", 3.0), EXACT, "vp", guidance=(2.0, 4.0)) > 1e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_are_log_normal_and_end_where_the_schedule_does(name):
    settings = Settings(mean=0.5, std=1.2)
    method = SCM(settings, {"teacher": Teacher(*SCHEDULES[name]), "student": Teacher(*SCHEDULES[name])}, 1.0, None)
    own, times = SCHEDULES[name][0], method.consistency.times(moment(2000).uniform("t"))
    tangents = (times * pi / 2).tan().log()
    assert tangents.median().item() == pytest.approx(0.5, abs=0.1)
    assert (tangents < -0.7).double().mean().item() == pytest.approx(0.159, abs=0.03)
    last = trig_time(own, torch.tensor([latest(own)], dtype=torch.float64)).item()
    assert method.consistency.first < times.min() and times.max() <= last
    at_end = (times > last - 1e-3).double().mean().item()
    # sigma / alpha ends at 14.6: ln 14.6 is 1.8 deviations up
    if name == "vp":
        assert 0.02 < at_end < 0.06 and last == pytest.approx(RADIAN * 1.5025, abs=1e-3) and latest(own) == 0.9999
    else:
        assert at_end < 0.001 and last == pytest.approx(RADIAN * atan(999), abs=1e-9)


class Asked:
    """A role that notes with how much noise it was asked, and whether for a gradient."""

    def __init__(self, role) -> None:
        self.role, self.schedule, self.calls = role, role.schedule, []

    def __call__(self, x_t, t, cond):
        self.calls.append((torch.is_grad_enabled(), t))
        return self.role(x_t, t, cond)


@pytest.mark.parametrize("settings, passes", [(EXACT, 2), (SECANT, 3), (PAIR, 4)])
def test_one_pass_takes_a_gradient_and_the_teacher_s_takes_none(settings, passes):
    teacher, student = Asked(Teacher(*SCHEDULES["vp"])), Asked(FlowMap("vp", 1.0))
    SCM(settings, {"teacher": teacher, "student": student}, 3.0, None).loss(batch(64), moment(64))
    assert [grad for grad, _ in teacher.calls] == [False] and len(teacher.calls[0][1]) == 128
    assert [grad for grad, _ in student.calls] == [False] * (passes - 1) + [True]
    if settings is not EXACT:
        assert all(1e-3 - 1e-9 <= t.min() and t.max() <= 1 for _, t in student.calls)


@pytest.mark.parametrize("wrong, message", [
    ({"std": 0.0}, "std"), ({"damping": 0.0}, "damping"), ({"width": -0.1}, "width"),
    ({"warmup": 1.5}, "share of the training"),
    ({"derivative": "jvp"}, "'exact', 'pair' or 'difference'; found 'jvp'")])
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_the_stock_scheduler_noises_x0_again():
    vp, flow = (spelled(SCM, Settings(), 2, name) for name in ("vp", "flow"))
    assert vp.scheduler == "LCMScheduler" and vp.config["original_inference_steps"] == 2
    assert flow.scheduler == "FlowMatchLCMScheduler" and flow.config["shift"] == 1
    start, middle = flow.call["sigmas"]
    assert start == pytest.approx(0.999) and middle / (1 - middle) == pytest.approx(tan(1.1), rel=0.02)
    assert vp.call["guidance_scale"] == flow.call["guidance_scale"] == 1.0


class Student(nn.Module):
    """The teacher plus a small network of x_t and the noise level that says nothing at first."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher, self.schedule = teacher, teacher.schedule
        self.net = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x_t, t, cond) -> Prediction:
        guess, angle = self.teacher(x_t, t, cond), self.schedule.angle(t)[:, None].to(x_t)
        output = self.net(torch.cat([x_t, angle.cos(), angle.sin()], 1))
        return Prediction(guess.raw + output, x_t, t, self.schedule, guess.kind)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_student_learns_the_guided_flow_map(name):
    torch.manual_seed(0)
    teacher = Teacher(*SCHEDULES[name])
    student, flow = Student(teacher), FlowMap(name, 2.0)
    method = SCM(SECANT, {"teacher": teacher, "student": student}, 2.0, None)
    optimizer = torch.optim.Adam(student.net.parameters(), lr=5e-3)
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(1))
    cond = batch(256).cond.map(lambda tensor: tensor.float())
    start = torch.ones(256, dtype=torch.float64)

    def distance() -> float:
        return ((student(noise, start, cond).x0 - flow(noise, start, cond).x0).square().mean().sqrt() / STD).item()
    before = distance()
    for index in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - index / 200)
        data = batch(64, offset=64 * index)
        step = Step(0, index, index / 200, "student", 0, data.ids)
        data = type(data)(data.ids, data.cond.map(lambda tensor: tensor.float()), data.x0.float())
        optimizer.zero_grad()
        method.loss(data, step)["consistency"].backward()
        optimizer.step()
    assert before > 0.8 and distance() < 0.15 * before, (before, distance())


def test_the_derivative_goes_through_adapters_attention_and_recomputation():
    """A real network in float64. Along x alone, differences see the derivative to 1e-7. Its times are read in float32,
    and it wiggles between two of them, so that backward differences see it to a twentieth where times move as well."""
    family = load_teacher("assets/shapes-sd")
    roles = build_roles(family, {"teacher": Frozen(), "student": Trained()}, {"student": Lora(rank=4)},
                        gradient_checkpointing=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    family.network.double()
    cond: Condition = family.encode(["a red ring", "a blue square"])
    x, dx = torch.randn(2, 2, *family.latent_shape, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    student, teacher = (viewed(roles[name], TRIG) for name in ("student", "teacher"))

    def field(x, t):
        return student(x, t, cond).v
    width = 1e-4
    ahead, behind = (field(x + s * dx, t) for s in (width, -width))
    for found, secant, tolerance in ((exact(field, x, t, dx, 0.0), (ahead - behind) / (2 * width), 1e-7),
                                     (exact(field, x, t, dx, RADIAN), trig_difference(field, x, t, dx, width), 0.05)):
        assert ((found - secant).norm() / found.norm()).item() < tolerance
    assert (exact(field, x, t, dx, RADIAN) - exact(lambda x, t: teacher(x, t, cond).v, x, t, dx, RADIAN)).norm() > 0.1


def test_defaults_cover_the_noise_that_sampling_starts_in():
    """One of twenty draws lies within the last fiftieth of a Stable Diffusion schedule, where the first step is."""
    method = SCM(Settings(), {"teacher": Teacher(*SCHEDULES["vp"]), "student": Teacher(*SCHEDULES["vp"])}, 1.0, None)
    times, last = (method.consistency.times(moment(2000).uniform("t")),
                   trig_time(SCHEDULES["vp"][0], torch.ones(1, dtype=torch.float64)))
    assert (times > 0.98 * last).double().mean() > 0.05


@pytest.mark.parametrize("config, index",
                         [({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, 999),
                                           ({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True,
                                             "beta_start": 0.00085, "beta_end": 0.012}, None),
                                           ({"beta_schedule": "squaredcos_cap_v2"}, None),
                                           ({"beta_schedule": "linear"}, None)])
def test_sampling_begins_at_the_last_node_that_is_trained(config, index):
    s = VariancePreserving.of(DDIMScheduler(**config).alphas_cumprod.double())
    timestep = 1000 * start(s) - 1
    at, after = (s.angle(torch.tensor([(timestep + 1 + i) / 1000], dtype=torch.float64)).tan().item() for i in (0, 1))
    assert timestep == pytest.approx(round(timestep), abs=1e-9) and at <= 80 + 1e-9
    assert timestep == index if index is not None else after > 80 or after < 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_teacher_with_its_guidance_within_is_not_guided_again(name):
    """As stages of `guided` and then this method have it."""
    teacher = Asked(Teacher(*SCHEDULES[name]))
    method = SCM(EXACT, {"teacher": self_guided(teacher, guidance_embedding=False), "student": FlowMap(name, 1.0)},
                 3.0, None)
    assert method.loss(batch(64), moment(64))["consistency"].item() < 1e-20
    assert [len(t) for _, t in teacher.calls] == [64]
