"""A schedule of roles, against closed forms: with a teacher that is known, each system's ends are samplers that exist
already, and what it does between them can be said by hand."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from stepdistill.diffusion.collaboration import (
    Course,
    adaptive,
    alone,
    distillation_pp,
    diversity,
    options_of,
    sent_back,
    system,
)
from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.exact import Gaussian
from stepdistill.diffusion.flow_map import secant_target
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import Sampler
from stepdistill.diffusion.toy import Toy, write
from stepdistill.errors import RequestError

from ..proofs.planting import Fault, plant
from .stock import SD15, NetworkRole, schedule_of

F64 = torch.float64
VP = {"timestep_spacing": "trailing", "clip_sample": False, "prediction_type": "v_prediction", **SD15}
EVEN = {"set_alpha_to_one": True, **VP}
STUDENTS = {"lcm": (LCMScheduler(original_inference_steps=4, **VP), {}), "ddim": (DDIMScheduler(**EVEN), {}),
            "euler": (EulerDiscreteScheduler(**{key: VP[key] for key in VP if key != "clip_sample"}), {}),
            "tcd": (TCDScheduler(original_inference_steps=4, **VP), {"eta": 0.3}),
            "flow": (FlowMatchEulerDiscreteScheduler(), {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
            "flow-lcm": (FlowMatchLCMScheduler(), {"sigmas": [1.0, 0.75, 0.5, 0.25]})}
TEACHERS = {"vp": ("ddim", DDIMScheduler(**EVEN)), "flow": ("flow", FlowMatchEulerDiscreteScheduler())}


def student(name: str, k: int = 4) -> tuple[Sampler, NetworkRole]:
    scheduler, call = STUDENTS[name]
    schedule = schedule_of(scheduler)
    role = NetworkRole(schedule, "velocity" if name.startswith("flow") else "v")
    return Sampler.of_call(scheduler, k, schedule, call), role


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict:
    """The exact teachers of a mixture in the plane, under both noises."""
    found = {}
    for noise, (_, scheduler) in TEACHERS.items():
        law = Toy(write(tmp_path_factory.mktemp(noise) / "toy", 3, noise))
        found[noise] = law.law(schedule_of(scheduler), "velocity" if noise == "flow" else "v")
    return found


def batch(n: int = 16) -> tuple[torch.Tensor, Condition]:
    label = torch.arange(n) % 2
    noise = torch.randn(n, 2, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    return noise, Condition(label=label, null=Condition(label=torch.full_like(label, -1)))


def drawing(seed: int = 1):
    """draw(i) as a function of i."""
    return lambda i: torch.randn(16, 2, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(100 * seed + i))


def own_sampler(noise: str, steps: int) -> Sampler:
    scheduler = TEACHERS[noise][1]
    even = {"sigmas": [1 - i / steps for i in range(steps)]} if noise == "flow" else {}
    return Sampler.of_call(scheduler, steps, schedule_of(scheduler), even)


def error_of_handover_at_the_end(toys, noise: str, steps: int = 4) -> float:
    """Of the teacher all the way against its own DDIM sampler."""
    teacher, (noises, cond), (sampler, role) = toys[noise], batch(), student(TEACHERS[noise][0])
    together = diversity(sampler, teacher.schedule, 2.5, teacher_steps=steps, handover=4)
    ours = together(role, teacher, noises, cond, drawing())
    known = own_sampler(noise, steps)(guided(teacher, 2.5), noises, cond)
    return (ours - known).abs().max().item()


def error_of_the_teacher_as_its_own_student(toys, noise: str) -> float:
    """Where the student is the guided teacher, sampled in 4 even steps, it makes no difference who takes which."""
    teacher, (noises, cond) = toys[noise], batch()
    sampler, _ = student(TEACHERS[noise][0])
    together = diversity(sampler, teacher.schedule, 2.5)
    ours = together(guided(teacher, 2.5), teacher, noises, cond, drawing())
    return (ours - sampler(guided(teacher, 2.5), noises, cond)).abs().max().item()


def gaussian(noise: str) -> Gaussian:
    schedule, c2 = schedule_of(TEACHERS[noise][1]), torch.tensor([0.3, 2.0], dtype=F64)
    return Gaussian(schedule, torch.tensor([0.5, -1.0], dtype=F64).reshape(2, 1, 1), c2, "v")


def error_of_the_handover(noise: str) -> float:
    """Of the state at the hand-over, after 100 steps, against the teacher's flow from the same noise."""
    law, (x, _) = gaussian(noise), batch()
    sampler, _ = student(TEACHERS[noise][0])
    together = diversity(sampler, law.schedule, 1.0, teacher_steps=100)
    course, at = Course(together), lambda t: torch.full((len(x),), t, dtype=F64)
    start = x
    while course.turn.role == "teacher":
        e = course.turn.evaluation
        x = course.take(replace(law(x, at(e.time)), t=at(e.level)), None)
    return (x - law.flow(start, at(1.0), at(sampler.evaluations[1].level))).abs().max().item()


def error_of_the_nudge(noise: str, weight: float = 0.3) -> float:
    """Of x_0 after the teacher has looked at it, on average over the noise that it was given, against
    mu + (1 - weight sigma^2 / (alpha^2 c^2 + sigma^2)) (x_0 - mu)."""
    law, (sampler, role), (x, _) = gaussian(noise), student(TEACHERS[noise][0]), batch()
    schedule, e = law.schedule, sampler.evaluations[0]
    t, r = (torch.full((len(x),), level, dtype=F64) for level in (e.level, e.landing))
    eps, found = drawing()(0), []
    for sign in (1, -1):
        course = Course(distillation_pp(sampler, schedule, 1.0, weight=weight))
        p = role(x, t)
        noised = course.take(p, sign * eps)
        landed = course.take(law(noised, r), None)
        found.append(secant_target(x, landed, t, r, schedule))
    alpha, sigma = schedule.alpha(r), schedule.sigma(r)
    kept = 1 - weight * (sigma**2)[:, None] / ((alpha**2)[:, None] * law.covariance + (sigma**2)[:, None])
    known = law.mean + kept[:, :, None, None] * (p.x0 - law.mean)
    return (sum(found) / 2 - known).abs().max().item()


@pytest.mark.parametrize("noise", TEACHERS)
def test_a_hand_over_at_the_end_is_the_teacher_s_own_sampler(toys, noise):
    assert error_of_handover_at_the_end(toys, noise, 4) <= 1e-9
    assert error_of_handover_at_the_end(toys, noise, 8) <= 1e-9


@pytest.mark.parametrize("noise", TEACHERS)
def test_a_student_that_is_the_teacher_is_not_told_from_it(toys, noise):
    assert error_of_the_teacher_as_its_own_student(toys, noise) <= 1e-9


@pytest.mark.parametrize("noise", TEACHERS)
def test_the_hand_over_lies_on_the_teacher_s_flow(noise):
    """Nothing is noised anew: the law at the hand-over has the deviation sqrt(alpha^2 c^2 + sigma^2), and every noise
    has its place in it."""
    assert error_of_the_handover(noise) <= 5e-3


@pytest.mark.parametrize("name", STUDENTS)
def test_a_hand_over_at_the_start_is_the_student_s_own_sampler(toys, name):
    sampler, role = student(name)
    noise, draw = torch.randn(16, 2, 1, 1, dtype=F64), drawing()
    known = sampler(role, noise, None, draw)
    for together in (diversity(sampler, role.schedule, 2.0, handover=0), alone(sampler)):
        assert torch.equal(together(role, None, noise, None, draw), known) and together.nfe() == 4


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_nudge_of_no_weight_leaves_the_student_s_picture(toys, name, steps):
    """The noise of its own steps stands after the teacher's turns."""
    sampler, role = student(name)
    teacher, (noise, cond), draw = toys["flow" if name.startswith("flow") else "vp"], batch(), drawing()
    own = lambda i: draw((i - 1) // 2 if i < 2 * steps else i - steps)
    together = distillation_pp(sampler, role.schedule, 2.0, weight=0.0, guided_steps=steps)
    torch.testing.assert_close(together(role, teacher, noise, cond, own), sampler(role, noise, None, draw),
                               rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", TEACHERS)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_nudge_goes_where_the_teacher_denoises_to(noise, weight):
    assert error_of_the_nudge(noise, weight) <= 1e-9


@pytest.mark.parametrize("noise", TEACHERS)
def test_who_is_not_sent_back_keeps_the_student_s_picture(toys, noise):
    teacher, (noises, cond), (sampler, role) = toys[noise], batch(), student("lcm" if noise == "vp" else "flow-lcm")
    known, half = sampler(role, noises, None, drawing()), torch.arange(16) % 2 == 0
    together = adaptive(sampler, teacher.schedule, 2.0)
    for chosen in (torch.zeros(16).bool(), half):
        found = together(role, teacher, noises, cond, drawing(), lambda x0, chosen=chosen: chosen)
        assert torch.equal(found[~chosen], known[~chosen])
        assert not chosen.any() or (found - known)[chosen].flatten(1).norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("noise", TEACHERS)
def test_all_sent_back_to_the_start_are_fresh_samples_of_the_teacher(toys, noise):
    teacher, (noises, cond), (sampler, role) = toys[noise], batch(), student("lcm" if noise == "vp" else "flow-lcm")
    together = adaptive(sampler, teacher.schedule, 2.0, teacher_steps=8, strength=1.0)
    found = together(role, teacher, noises, cond, drawing(), lambda x0: torch.ones(len(x0)).bool())
    fresh = own_sampler(noise, 8)(guided(teacher, 2.0), drawing()(3), cond)
    torch.testing.assert_close(found, fresh, rtol=0, atol=1e-9)


def test_a_little_strength_changes_little(toys):
    teacher, (noises, cond), (sampler, role) = toys["flow"], batch(), student("flow-lcm")
    known, every = sampler(role, noises, None, drawing()), lambda x0: torch.ones(len(x0)).bool()
    apart = [(adaptive(sampler, teacher.schedule, 2.0, strength=strength)(role, teacher, noises, cond, drawing(), every)
              - known).abs().mean().item() for strength in (1e-4, 0.4, 1.0)]
    assert apart[0] < 1e-3 < apart[1] < apart[2]


def test_the_share_that_is_sent_back_is_the_one_that_was_asked_for():
    scores = torch.randperm(40, generator=torch.Generator().manual_seed(0)).double()
    for share in (0.0, 0.1, 0.5, 0.95, 1.0):
        assert (scores < sent_back(scores, share)).sum() == round(40 * share)
    assert sent_back(torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.5) == 3.0          # and who scores as much stays
    assert not (torch.full((9,), 0.25) < sent_back(torch.full((9,), 0.25), 0.5)).any()
    with pytest.raises(RequestError, match="a share of samples is from 0 to 1; found 50"):
        sent_back(scores, 50)


COUNTS = [("diversity", 2.0, {}, 5), ("diversity", 1.0, {}, 4), ("diversity", 1.0, {"teacher_steps": 2}, 5),
          ("diversity", 2.0, {"teacher_steps": 4, "handover": 2}, 10), ("diversity", 2.0, {"handover": 0}, 4),
          ("diversity", 2.0, {"handover": 4, "teacher_steps": 3}, 6), ("distillation_pp", 2.0, {}, 6),
          ("distillation_pp", 1.0, {}, 5), ("distillation_pp", 2.0, {"guided_steps": 3}, 10),
          ("adaptive", 2.0, {}, 12), ("adaptive", 1.0, {"teacher_steps": 2}, 6)]


@pytest.mark.parametrize("name,guidance,options,nfe", COUNTS)
def test_evaluations_of_both_networks_are_counted(toys, name, guidance, options, nfe):
    """By the books, and by the networks themselves, of which a guided one is asked twice for each sample."""
    asked, (noises, cond), (sampler, role) = [], batch(), student("lcm")
    together = system(name, sampler, role.schedule, guidance, **options)

    def teacher(x_t, t, cond=None):
        asked.append(len(x_t))
        return toys["vp"](x_t, t, cond)
    own = [turn for turn in together.turns if turn.role == "student"]
    together(role, teacher, noises, cond, drawing(), lambda x0: torch.ones(len(x0)).bool())
    assert together.nfe() == nfe == len(own) + sum(asked) / 16
    if name == "adaptive":
        assert together.nfe(0.0) == 4 and together.nfe(0.25) == 4 + (nfe - 4) / 4


def test_a_discrete_teacher_is_asked_at_whole_nodes():
    sampler, role = student("ddim")
    for together in (diversity(sampler, role.schedule, 2.0, teacher_steps=7), adaptive(sampler, role.schedule, 2.0,
                                                                                       teacher_steps=3)):
        times = [turn.evaluation.time * 1000 for turn in together.turns if turn.role == "teacher"]
        assert all(abs(t - round(t)) < 1e-9 for t in times)
        assert [a.evaluation.landing == b.evaluation.level for a, b in zip(together.turns, together.turns[1:])
                if a.back is None] == [True] * (len(together.turns) - 1 - (together.turns[3].back is not None))


REFUSALS = {
    "there is no system 'divers'.*there are diversity, distillation_pp, adaptive": ("divers", {}),
    "diversity has no option weight: it has teacher_steps, handover": ("diversity", {"weight": 0.2}),
    "teacher_steps of diversity is a whole number, such as 1; found 1.5": ("diversity", {"teacher_steps": 1.5}),
    "0 to 3, or at 4 not at all; found handover = 5": ("diversity", {"handover": 5}),
    "teacher_steps of diversity is from 1 to 1000; found teacher_steps = 0": ("diversity", {"teacher_steps": 0}),
    "has 250 times from t = 1 to 0.75, and takes a step from each at most; found teacher_steps = 251":
        ("diversity", {"teacher_steps": 251}),
    "has 400 times from t = 0.4 to 0, .*found teacher_steps = 401": ("adaptive", {"teacher_steps": 401}),
    "from 0 to 1; found weight = 1.5": ("distillation_pp", {"weight": 1.5}),
    "in 1 to 3 of 4 steps; found guided_steps = 4": ("distillation_pp", {"guided_steps": 4}),
    "from 0.001 to 1; found strength = 0": ("adaptive", {"strength": 0}),
    "guidance scale is at least 1, which is none; found 0.5": ("diversity", {"guidance": 0.5}),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_does_not_fit_is_refused_with_what_would(words):
    name, options = REFUSALS[words]
    sampler, role = student("ddim")
    with pytest.raises(RequestError, match=words):
        system(name, sampler, role.schedule, **{"guidance": 2.0, **options})


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_sampler_that_looks_back_is_refused(scheduler):
    scheduler = scheduler.from_config(DDIMScheduler(**EVEN).config)
    sampler = Sampler.of(scheduler, 4, schedule_of(scheduler))
    for name in ("diversity", "distillation_pp", "adaptive"):
        with pytest.raises(RequestError, match="looks back at an earlier evaluation, where the teacher's would be: "
                           "give it one whose steps stand alone, such as LCMScheduler"):
            system(name, sampler, schedule_of(scheduler), 2.0)


def test_nobody_judges_where_a_judge_is_needed():
    sampler, role = student("lcm")
    with pytest.raises(RequestError, match="sends some samples back to the teacher, and nothing says which"):
        adaptive(sampler, role.schedule, 2.0)(role, role, batch()[0], None, drawing())


def test_the_options_are_those_of_the_papers():
    assert options_of("diversity") == {"teacher_steps": 1, "handover": 1}
    assert options_of("distillation_pp") == {"weight": 0.1, "guided_steps": 1}
    assert options_of("adaptive") == {"teacher_steps": 4, "strength": 0.4}


FAULTS = {
    "the teacher is asked at another scale": (
        'guided(teacher, turn.scale) if', "guided(teacher, turn.scale + 1) if", error_of_handover_at_the_end),
    "the hand-over noises anew": (
        "return ddim_step(history[-1], r)",
        "return history[-1].schedule.add_noise(history[-1].x0, history[-1].x_t.roll(1, 0), r)", error_of_the_handover),
    "the teacher stops short of the hand-over": (
        "student.evaluations[handover].level", "student.evaluations[handover - 1].level", error_of_the_handover),
    "the student keeps its own x_0": (
        "student.x0 + weight * (teacher.x0 - student.x0)", "student.x0 + 0 * (teacher.x0 - student.x0)",
        error_of_the_nudge),
    "the teacher's x_0 takes the other's weight": (
        "student.x0 + weight * (teacher.x0 - student.x0)", "teacher.x0 + weight * (student.x0 - teacher.x0)",
        error_of_the_nudge),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(toys, name, monkeypatch):
    old, new, error = FAULTS[name]
    plant(monkeypatch, Fault(name, "diffusion.collaboration", old, new, ()))
    given = (toys, "vp") if error is error_of_handover_at_the_end else ("vp",)
    assert error(*given) > 1e-2


def test_a_miscounted_guided_turn_is_noticed(monkeypatch):
    plant(monkeypatch, Fault("count", "diffusion.collaboration", "return 1 if self.scale == 1 else 2", "return 1", ()))
    sampler, role = student("lcm")
    assert all(system(name, sampler, role.schedule, w, **options).nfe() != nfe for name, w, options, nfe in COUNTS
               if w > 1 and options.get("handover") != 0)
