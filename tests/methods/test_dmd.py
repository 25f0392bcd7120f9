from dataclasses import replace

import pytest
import torch

from stepdistill.diffusion.contracts import Batch, Pairs
from stepdistill.methods import METHODS
from stepdistill.methods.distribution.dmd import DMD, Settings
from stepdistill.recipe import Recipe
from stepdistill.run.plan import plan

from .players import REAL_MEAN, REAL_VARIANCE, SCHEDULES, affine, few_steps, gaussian, moment, prompts, spelled

COUNT = 64


def make(schedule: str = "vp", student=None, **settings) -> DMD:
    s, kind = SCHEDULES[schedule]
    roles = {"teacher": gaussian(s, REAL_MEAN, REAL_VARIANCE, kind), "student": student or affine(s, -0.3, 1.2),
             "critic": gaussian(s, -0.3, 1.44, kind)}
    return DMD(Settings(**settings), roles, 1.0, few_steps(1, schedule))


def pairs(count: int = COUNT, nodes: int = 1) -> Batch:
    """Noises, and pictures that are 3 z + 1: no function of anything else."""
    noise = torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    ways = torch.stack([(3 * noise + 1) * (i + 1) / nodes for i in range(nodes)], 1)
    times = torch.linspace(1, 0, nodes + 1, dtype=torch.float64)[1:].expand(count, -1)
    return replace(prompts(count), x0=ways[:, -1], pairs=Pairs(noise, ways, times))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("nodes", [1, 4])
def test_the_student_is_drawn_to_the_end_of_the_way_that_began_in_its_noise(schedule, nodes):
    """Least squares of m + s z, at z of the pairs, finds 1 and 3 wherever the way was kept between."""
    s = SCHEDULES[schedule][0]
    student = affine(s, 1.0, 3.0)
    make(schedule, student).student_loss(pairs(nodes=nodes), moment(COUNT))["regression"].backward()
    assert abs(student.m.grad) < 1e-6 and abs(student.s.grad) < 1e-6
    student = affine(s, 0.0, 3.0)
    make(schedule, student, regression_weight=0.4).student_loss(pairs(nodes=nodes),
                                                                moment(COUNT))["regression"].backward()
    assert student.m.grad.item() == pytest.approx(-0.8, rel=1e-6)


def test_the_scores_are_matched_on_fresh_noise_and_see_nothing_of_the_pairs():
    student, step, batch = affine(SCHEDULES["vp"][0], -0.3, 1.2), moment(COUNT), pairs()
    found = make(student=student).student_loss(batch, step)
    fresh, own = student.given
    torch.testing.assert_close(fresh, step.normal("start", (1,)))
    torch.testing.assert_close(own, batch.pairs.noise)
    other = replace(batch, pairs=replace(batch.pairs, nodes=batch.pairs.nodes + 5))
    again = make(student=student).student_loss(other, moment(COUNT))
    assert (found["matching"].item() == again["matching"].item() and found["regression"].item()
            != again["regression"].item())


def test_the_critic_denoises_the_sample_of_fresh_noise():
    student, step, later = affine(SCHEDULES["vp"][0], -0.3, 1.2), moment(COUNT), moment(COUNT, "critic")
    method = make(student=student)
    method.student_loss(pairs(), step)
    torch.testing.assert_close(step.kept["sample"], -0.3 + 1.2 * step.normal("start", (1,)))
    later.kept.update(step.kept)
    asked = len(student.given)
    assert (method.critic_loss(pairs(), later)["denoising"] > 0 and len(student.given) == asked
            and not step.kept["sample"].requires_grad)
    assert [(u.trains, u.repeat, u.shares) for u in method.updates()] == [(("student",), 1, 0), (("critic",), 1, 1)]


@pytest.mark.parametrize("end, shares", [(1.0, (1.0, 0.75, 0.5, 0.01)), (0.5, (1.0, 0.5, 0.0, 0.0)),
                                         (None, (1.0, 1.0, 1.0, 1.0))])
def test_the_pairs_fade_and_the_scores_have_the_last_word(end, shares):
    method = make(regression_weight=0.4, regression_end=end)
    found = [method.student_loss(pairs(), replace(moment(COUNT), progress=at)) for at in (0.0, 0.25, 0.5, 0.99)]
    first = found[0]["regression"].item()
    assert first > 0 and [losses["regression"].item() / first for losses in found] == pytest.approx(shares, rel=1e-6)
    assert len({losses["matching"].item() for losses in found}) == 1
    assert Settings().regression_end == 1.0


def test_a_weight_of_zero_leaves_the_scores_alone():
    losses = make(regression_weight=0.0).student_loss(pairs(), moment(COUNT))
    assert losses["regression"] == 0 and losses["matching"] > 0


def test_pairs_are_all_it_trains_on_and_one_step_all_it_makes(tiny_teacher):
    assert METHODS["dmd"].data == ("pairs",)
    with pytest.raises(ValueError, match="one-step students, found 4 steps"):
        spelled(DMD, Settings(), 4, "vp")
    made = {"method": "dmd", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
            "guidance": 2.0, "steps": 1,
            "data": {"pairs": {"prompts": "shapes", "steps": 4}, "count": 8, "batch": 4}, "train": {"updates": 2}}
    # forward: the student twice, the teacher guided, the critic twice; backward: the student twice, the critic once
    assert plan(Recipe.load(made))["passes"] == {"forward": 6, "backward": 3, "batch": 4, "updates": 2}


@pytest.mark.parametrize("changes", [{"regression_weight": -0.1}, {"regression_end": 0.0}, {"regression_end": 1.5},
                                     {"t_range": (0.5, 0.5)}, {"t_range": (0.0, 1.2)}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must"):
        Settings(**changes)
