"""Precision, recall, density and coverage at their ends, by hand, and how often their intervals hold the truth."""
from __future__ import annotations

import pytest
import torch

from stepdistill.evaluation.estimate import jackknife, mean_of, student
from stepdistill.evaluation.manifolds import manifolds
from stepdistill.evaluation.means import diversity

from .test_fd import gaussian


def values(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    return {name: estimate.value for name, estimate in manifolds(x, y).items()}


def test_the_ends():
    x = gaussian(300, 8, seed=0)
    # 5 others and itself
    assert values(x, x) == {"precision": 1.0, "recall": 1.0, "density": pytest.approx(1.2, abs=0.05), "coverage": 1.0}
    assert values(x + 100, x) == {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}
    collapsed = values(0.1 * gaussian(300, 8, seed=1), x)                             # onto the middle
    assert (collapsed["precision"] > 0.9 and collapsed["recall"] < 0.2 and collapsed["coverage"] < 0.5
            and collapsed["density"] > 1)


def test_each_figure_by_hand():
    """On a line: the reference at 0, 1, 2, …, 19, so that balls of k = 3 reach 2 (more at the ends), of 5 reach 3 (more
    at the ends)."""
    y = torch.arange(20.0)[:, None]
    x = torch.cat([torch.full((10, 1), 10.4), 100 + torch.arange(10.0)[:, None]])
    inside = lambda at, reach: sum(abs(at - float(member)) <= reach(i) for i, member in enumerate(y))
    reach = lambda k: lambda i: sorted(abs(float(y[i] - other)) for j, other in enumerate(y) if j != i)[k - 1]
    found = values(x, y)
    assert found["precision"] == 0.5 and found["density"] == pytest.approx(0.5 * inside(10.4, reach(5)) / 5)
    assert found["coverage"] == pytest.approx(inside(10.4, reach(5)) / 20)
    # the balls of equal members have no extent
    assert found["recall"] == 0.0


@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_their_intervals_hold_what_they_say(scale):
    """The truth is the mean at this count, over repetitions. The jackknife errs on the wide side (Efron & Stein 1981),
    most for coverage."""
    found = [manifolds(scale * gaussian(300, 6, seed=3000 + i), gaussian(300, 6, seed=7000 + i)) for i in range(60)]
    for name in found[0]:
        each = [one[name] for one in found]
        mean = torch.tensor([e.value for e in each])
        held = sum(e.low <= mean.mean() <= e.high for e in each)
        assert held >= 51, f"{name}: {held} of 60"
        assert sum(e.high - e.low for e in each) / 120 < (4.5 if name == "coverage" else 3.4) * mean.std(), (
            f"{name}: an interval that covers by being wide says nothing")


def test_diversity_is_the_mean_distance_within_a_prompt():
    groups = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 2.0]]])
    assert diversity(groups).value == pytest.approx((5 + 1) / 2)
    alone = diversity([torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])])
    assert (alone.value, alone.low, alone.high) == (pytest.approx(10 / 3), None, None)


def test_the_interval_of_a_mean_is_students():
    assert [student(freedom) for freedom in (4, 9, 30, 1e9)] == pytest.approx([2.776, 2.262, 2.042, 1.96], abs=0.01)
    found = [mean_of(gaussian(6, seed=i)) for i in range(400)]
    assert 0.92 < sum(e.low <= 0 <= e.high for e in found) / 400 < 0.98
    x = gaussian(12, seed=1)
    left_out = torch.stack([torch.cat([x[:i], x[i + 1:]]).mean() for i in range(12)])
    assert jackknife([left_out]).item() == pytest.approx((x.var() / 12).item())       # of a mean it is exact
