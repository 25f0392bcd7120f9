"""How much of a style is kept: closed forms, intervals that hold what was planted, and the words for it."""
from __future__ import annotations

import pytest
import torch

from stepdistill.evaluation.estimate import Estimate, ratio_of
from stepdistill.evaluation.style import Worn, differ, distance, kept, verdict

DIM = 8


def planted(generator: torch.Generator, n: int, share: float, aside: float = 0.0):
    """(base, styled base, student, styled student): the base moves by v in the mean, the student by `share` of v, and
    by `aside` across it."""
    draw = lambda: torch.randn(n, DIM, generator=generator)
    v, across = torch.eye(DIM)[0] * 2, torch.eye(DIM)[1]
    base, student = 3 * draw(), 3 * draw()
    return base, base + v + draw(), student, student + share * v + aside * across + draw()


def test_what_moves_as_the_base_does_keeps_all_of_it_and_half_as_far_half():
    base, styled, _, _ = planted(torch.Generator().manual_seed(0), 40, 1.0)
    whole = kept(base, styled, base, styled)
    assert (whole.value, whole.low, whole.high) == pytest.approx((1.0, 1.0, 1.0))
    half = kept(base, styled, base, base + (styled - base) / 2)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert kept(base, styled, base, base - (styled - base)).value == pytest.approx(-1.0)


def test_what_lies_across_the_style_is_none_of_it():
    found = kept(*planted(torch.Generator().manual_seed(1), 4000, 0.0, aside=5.0))
    assert abs(found.value) < 0.06 and found.low < 0 < found.high


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_intervals_hold_what_was_planted(share):
    generator, held, values = torch.Generator().manual_seed(2), 0, []
    for _ in range(200):
        found = kept(*planted(generator, 48, share))
        held += found.low <= share <= found.high
        values.append(found.value)
    # 95 of 100; a binomial's 3 standard deviations are 9 of 200
    assert 180 <= held <= 199
    assert torch.tensor(values).mean().item() == pytest.approx(share, abs=0.03)


def test_a_style_that_does_nothing_has_no_share():
    generator, seen = torch.Generator().manual_seed(3), 0
    for _ in range(100):
        base = torch.randn(32, DIM, generator=generator)
        seen += kept(base, base + 0.3 * torch.randn(32, DIM, generator=generator), base, base) is not None
    assert seen <= 8                                                   # of 100 two or three, by the interval


def test_a_ratio_of_pairs_is_that_of_their_means_and_what_they_share_cancels():
    x = torch.tensor([1.0, 2.0, 4.0, 3.0])
    same = ratio_of(0.7 * x, x)
    assert (same.value, same.low, same.high) == pytest.approx((0.7, 0.7, 0.7))
    left_out = torch.tensor([9 / 7, 8 / 6, 6 / 4, 7 / 7]).double()     # (10 - x) / (8 - y) of these pairs
    found = ratio_of(x, torch.tensor([1.0, 2.0, 4.0, 1.0]))
    spread = ((left_out - left_out.mean()).square().sum() * 3 / 4).sqrt().item()
    # Student's t of 3
    assert found.value == 10 / 8 and (found.high - found.low) / 2 == pytest.approx(3.18 * spread, rel=0.02)


def test_what_pictures_of_a_prompt_differ_by_is_held_against_the_base():
    x = torch.randn(12, DIM, generator=torch.Generator().manual_seed(4))
    found = differ(0.25 * x + 7, x, prompts=3)
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert differ(x[:4], x[:4], prompts=1) is None and differ(x, torch.ones_like(x), prompts=3) is None


def test_the_frechet_distance_is_of_different_noise():
    """Each set is of 8 rounds through 50 prompts: the student's odd ones are held against the base's even ones."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(400, DIM, generator=generator)
    rounds = (torch.arange(400) // 50).remainder(2).bool()[:, None]
    # what is not looked at may be anything
    student = torch.where(rounds, torch.randn(400, DIM, generator=generator) + 1, 100.0)
    found = distance(student, torch.where(rounds, -100.0, base), 50, 0)
    # |mean|^2 of a shift by 1 in each direction
    assert found.low < DIM < found.high and found.high - found.low < DIM
    assert distance(student[:50], base[:50], 5, 0) is None


def worn(scale, value, ratio=1.0, less=None, width=0.02):
    around = lambda x: None if x is None else Estimate(x, x - width, x + width)
    return Worn(scale, around(value), around(ratio), around(less), None)


SAME, MUCH = Estimate(0.2, 0.15, 0.25), Estimate(1.0, 0.95, 1.05)


@pytest.mark.parametrize("rows, bare, says", [
    ([worn(0.5, 0.95), worn(1, 0.92)], MUCH,
     "keeps the style: 95 % (93 to 97) at scale 0.5, 92 % (90 to 94) at scale 1; pictures of one prompt differ "
     "as much as the base's"),
    ([worn(0.5, 0.9), worn(0.75, 0.7), worn(1, 0.2)], MUCH, "the style is lost above scale 0.75 (kept are 90 % "),
    ([worn(0.5, 0.1), worn(1, 0.2)], MUCH, "the style is lost at every scale"),
    ([worn(0.5, 0.1), worn(1, 0.9)], MUCH, "the style is lost at scale 0.5 (kept"),
    ([worn(0.5, 0.9), worn(1, 0.6)], MUCH, "keeps a part of the style: 90 %"),
    ([worn(0.5, 1.0), worn(1, 1.5)], MUCH, "the style is overdone at scale 1 (kept"),
    ([worn(1, 0.8, width=0.2)], MUCH, "keeps of the style 80 % (60 to 100) at scale 1, and more samples would tell"),
    ([worn(0.5, None), worn(1, None)], MUCH, "the style changes nothing on the base that clip sees"),
    ([worn(0.5, None), worn(1, 0.9)], MUCH, "keeps the style: 90 % (88 to 92) at scale 1"),
    ([worn(1, 0.9, ratio=0.2)], SAME, "all seeds draw nearly the same picture"),
    ([worn(1, 0.9, ratio=0.2)], MUCH, "all seeds draw nearly the same picture at scale 1"),
    ([worn(1, 0.9)], SAME, "all seeds draw nearly the same picture at no style"),
    ([worn(1, 0.9, ratio=0.6)], MUCH, "pictures of one prompt differ less than the base's, 60 % (58 to 62) at "
     "the least"),
    ([worn(1, 0.9, ratio=1.4)], MUCH, "pictures of one prompt differ more than the base's, 140 % (138 to 142) "
     "at the most"),
    ([worn(1, 0.9, ratio=0.9, width=0.2)], MUCH, "differ by 90 % (70 to 110) of what the base's do, and more samples "
     "would tell"),
    ([worn(0.5, 0.9, less=-0.5), worn(1, 0.9, less=-3)], MUCH, "prompts are followed less at scale 1 (CLIP "
     "score -3.0)"),
])
def test_words(rows, bare, says):
    found = verdict(rows, bare, "clip")
    assert says in found
    assert ("followed less" in found) == any(one.followed is not None and one.followed.high < -1 for one in rows)
