"""KID and CMMD against double sums written out; how often their intervals hold the truth."""
from __future__ import annotations

import pytest
import torch

from stepdistill.evaluation.estimate import Estimate
from stepdistill.evaluation.kernels import cmmd, kid

from .test_fd import gaussian


def held(found: list[Estimate], truth: float) -> float:
    return sum(e.low <= truth <= e.high for e in found) / len(found)


def test_kid_is_unbiased_and_equals_the_double_sum():
    x, y = gaussian(40, 8, seed=0), 0.5 + gaussian(40, 8, seed=1)
    k = lambda a, b: (a @ b / 8 + 1) ** 3
    pairs = lambda s: sum(k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
    cross = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    assert kid(x, y).value == pytest.approx((pairs(x) + pairs(y) - 2 * cross).item(), rel=1e-9)


@pytest.mark.parametrize("n", [10, 200])
def test_kid_is_unbiased_at_small_n(n):
    same = torch.tensor([kid(gaussian(n, 8, seed=10 + i), gaussian(n, 8, seed=900 + i)).value for i in range(80)])
    assert abs(same.mean()) < 3 * same.std() / 80**0.5


@pytest.mark.parametrize(("n", "m", "size", "rounds"), [(30, 40, 30, 1), (20, 45, 20, 2), (1500, 700, 700, 2)])
def test_kid_takes_blocks_of_one_size(n, m, size, rounds):
    x, y = gaussian(n, 4, seed=0), gaussian(m, 4, seed=1)
    block = lambda side, i: side[i % (len(side) // size) * size:][:size]
    assert kid(x, y).value == pytest.approx(sum(kid(block(x, i), block(y, i)).value for i in range(rounds)) / rounds)


def test_kid_averages_over_blocks():
    x, y = gaussian(2000, 8, seed=0), gaussian(2000, 8, seed=1)
    assert kid(x, y).value == pytest.approx((kid(x[:1000], y[:1000]).value + kid(x[1000:], y[1000:]).value) / 2)


def expected_kid(shift: float, dim: int) -> float:
    """Of N(0, 1) and N(shift, 1): (u + 1)^3 with u = x . y / D has the mean 1 + 3 E u + 3 E u^2 + E u^3, and E over x,
    x' of one law."""
    s = shift**2                                     # |mean|^2 / D
    of = (lambda one, two, both: 1 + 3 * both + 3 * (both**2 + (1 + one + two) / dim) + both**3
          + 3 * both * (1 + one + two) / dim + 6 * both / dim**2)
    return of(0, 0, 0) + of(s, s, s) - 2 * of(0, s, 0)


@pytest.mark.parametrize("shift", [0.0, pytest.param(0.1, marks=pytest.mark.long), 0.3])
@pytest.mark.parametrize(("n", "m"), [(300, 130), pytest.param(1000, 2000, marks=pytest.mark.long)])
def test_the_interval_of_kid_holds_what_it_says(shift, n, m):
    found = [kid(shift + gaussian(n, 16, seed=3000 + i), gaussian(m, 16, seed=7000 + i)) for i in range(100)]
    truth, values = expected_kid(shift, 16), torch.tensor([e.value for e in found])
    assert abs(values.mean() - truth) < 3.5 * values.std() / 10
    assert held(found, truth) >= 0.88, (
        "of 100 repetitions 95 % would be 95; fewer than 88 come about by chance in one case of 300")
    assert sum(e.high - e.low for e in found) / 200 < 3 * values.std(), (
        "an interval that covers by being wide says nothing")


def test_cmmd_is_the_published_one():
    x, y = gaussian(30, 8, seed=0), 0.5 + gaussian(40, 8, seed=1)
    unit = lambda side: [a / a.norm() for a in side]
    mean = (lambda a, b: sum(torch.exp(-(u - v).square().sum() / 200) for u in unit(a) for v in unit(b))
            / (len(a) * len(b)))
    assert cmmd(x, y).value == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)).item(), rel=1e-8)
    assert cmmd(x, x).value == pytest.approx(0, abs=1e-9)
    assert cmmd(x, y).value == pytest.approx(cmmd(3 * x, y).value)                     # of directions alone


@pytest.mark.parametrize("shift", [0.05, 0.3])
def test_the_interval_of_cmmd_holds_what_it_says(shift):
    found = [cmmd(shift + gaussian(300, 16, seed=3000 + i), gaussian(400, 16, seed=7000 + i)) for i in range(100)]
    values = torch.tensor([e.value for e in found])
    assert held(found, values.mean().item()) >= 0.88
    assert sum(e.high - e.low for e in found) / 200 < 3 * values.std()
