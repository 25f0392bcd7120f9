"""Decoupled DMD, a setting of DMD2: the match is the unguided teacher's, and guidance acts below the exit's level."""
from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.contracts import Batch, Condition
from stepdistill.methods.distribution.dmd2 import DMD2, Settings
from stepdistill.proofs.problem import FunctionRole

from .players import SCHEDULES, affine, few_steps, gaussian, moment

COUNT, W = 64, 3.0
SPLIT, PLAIN = Settings(gan_weight=0, decoupled=True), Settings(gan_weight=0)


def batch() -> Batch:
    text = torch.full((COUNT, 1), 0.8, dtype=torch.float64)
    return Batch(torch.arange(COUNT), Condition(text=text, null=Condition(text=-text)), shape=(1,))


def make(schedule: str, settings: Settings, w: float, steps: int = 1, student=None):
    """A teacher whose x_0 is its text, plus a tenth of x_t: guided at w it is that of null + w (text - null)."""
    s, kind = SCHEDULES[schedule]
    roles = {"teacher": FunctionRole(s, lambda x, t, c: c.text + 0.1 * x, kind),
             "student": student or affine(s, -0.3, 1.2), "critic": gaussian(s, -0.3, 1.44, kind)}
    return DMD2(settings, roles, w, few_steps(steps, schedule)), roles


def slopes(loss, student) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, (student.m, student.s), retain_graph=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_match_is_the_unguided_teachers_to_the_bit(schedule):
    (split, ours), (plain, theirs) = make(schedule, SPLIT, W), make(schedule, PLAIN, 1.0)
    found, known = (method.student_loss(batch(), moment(COUNT)) for method in (split, plain))
    assert list(found) == ["matching", "guidance"] and list(known) == ["matching"]
    assert torch.equal(found["matching"], known["matching"])
    assert slopes(found["matching"], ours["student"]) == slopes(known["matching"], theirs["student"])
    alone, roles = make(schedule, SPLIT, 1.0)
    assert slopes(alone.student_loss(batch(), moment(COUNT))["guidance"], roles["student"]) == [0, 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_guidance_adds_w_less_1_times_what_it_takes_apart_of_one_size(schedule):
    method, roles = make(schedule, SPLIT, W)
    step, s = moment(COUNT), SCHEDULES[schedule][0]
    found = slopes(method.student_loss(batch(), step)["guidance"], roles["student"])
    z, share = step.normal("start", (1,)).double(), method.matched(step.uniform("guidance t"))
    x, t = -0.3 + 1.2 * z, (1000 * share).round() / 1000                      # one step: the exit lies at t = 1
    x_t = s.add_noise(x, step.normal("guidance noise", (1,)), t)
    pull = -(W - 1) * 1.6 / (x - (-0.8 + W * 1.6 + 0.1 * x_t)).abs()
    torch.testing.assert_close(torch.stack(found), torch.stack([pull.mean(), (pull * z).mean()]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_of_guidance_lie_below_each_exits_own(schedule):
    student = FunctionRole(SCHEDULES[schedule][0], lambda x, t, c: x / 2)
    method, roles = make(schedule, SPLIT, W, 4, student)
    moments = {int(step.shared("exit") * 4): step for step in (moment(COUNT, index=i) for i in range(40))}
    for exit, step in sorted(moments.items()):
        roles["teacher"].calls.clear()
        method.student_loss(batch(), step)
        matched, *added = (t for _, t, _ in roles["teacher"].calls)
        level = 1 - exit / 4
        assert all(0.9 * level < t.max() <= 0.98 * level + 2e-3 and t.min() < 0.1 * level for t in added)
        assert matched.max() > 0.9                                            # the match at all levels
    assert len(moments) == 4
