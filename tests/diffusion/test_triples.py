"""Laws of times: what follows from t is a node, uniform where it is drawn, and counts grow as the papers have them."""
from math import ceil, sqrt

import pytest
import torch

from stepdistill.diffusion.times import discrete, log_normal
from stepdistill.diffusion.triples import (
    above,
    among,
    below,
    beside,
    constant,
    doubling,
    exponential,
    grid,
    linear,
    ordered,
    ratio,
)

from .schedules import SCHEDULES

F64 = torch.float64
U = (torch.arange(12_000, dtype=F64) + 0.5) / 12_000


@pytest.mark.parametrize("steps, parts", [(40, 4), (1280, 8), (50, 1), (30, 3), (7, 7)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_grid_holds_the_edges_of_its_segments_to_the_bit(steps, parts, shift):
    nodes, edges = grid(steps, shift), grid(parts, shift)
    assert len(nodes) == steps + 1 and nodes[0] == 0 and nodes[-1] == 1 and (nodes.diff() > 0).all()
    assert all((nodes == edge).any() for edge in edges)
    i = torch.arange(steps + 1, dtype=F64) / steps
    assert torch.allclose(nodes, shift * i / (1 + (shift - 1) * i))


def test_a_grid_ends_where_the_sampler_does():
    assert grid(4, end=0.001).tolist() == [0.001, 0.25, 0.5, 0.75, 1.0]


def test_nodes_below():
    nodes = grid(5)
    t = torch.tensor([0.0, 0.1, 0.2, 0.6, 0.61, 1.0], dtype=F64)
    assert below(t, nodes).tolist() == [0.0, 0.0, 0.0, nodes[2], nodes[3], nodes[4]]
    assert below(t, nodes, 3).tolist() == [0.0, 0.0, 0.0, 0.0, nodes[1], nodes[2]]
    every = discrete(nodes[1:])(U)
    assert torch.equal(below(every, nodes), nodes[(U * 5).long()])


def test_the_node_above():
    t = torch.tensor([0.0, 0.1, 0.25, 0.74, 0.75, 1.0], dtype=F64)
    assert above(t, grid(4)).tolist() == [0.25, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_an_edge_belongs_to_the_segment_below():
    t = torch.tensor([0.001, 0.25, 0.2500001, 0.5, 0.999, 1.0], dtype=F64)
    assert below(t, grid(4)).tolist() == [0.0, 0.0, 0.25, 0.25, 0.75, 0.75]


def test_among_is_uniform_on_the_nodes_between_and_both_ends_count():
    nodes = grid(10)
    found = among(nodes, nodes[3:4], nodes[7].repeat(len(U)), U)
    assert found.unique().tolist() == nodes[3:8].tolist()
    assert all((found == node).sum() == len(U) / 5 for node in nodes[3:8])
    assert torch.equal(among(nodes, nodes[:1], nodes[0].repeat(len(U)), U), 0 * U)


def test_among_nodes_that_do_not_hold_the_ends():
    """The edges of Hyper-SD's segments do not lie on its solver's grid of 50: between 1/8 and 0.3 these are 0.14 ..
    0.3; below the first node above an edge there is none, and the state itself is the landing."""
    low, high = (torch.full((len(U),), u, dtype=F64) for u in (0.125, 0.31))
    found = among(grid(50), low, high, U)
    assert torch.allclose(found.unique(), torch.arange(7, 16, dtype=F64) / 50)
    assert torch.equal(among(grid(50), low, 0 * high + 0.13, U), 0 * high + 0.13)
    assert torch.equal(among(grid(50), 0 * low + 0.99, 0 * high + 0.995, U), 0 * high + 0.995)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_ratio_is_of_sigma_over_alpha(name):
    schedule, t = SCHEDULES[name], torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    known = schedule.angle(t).tan() * torch.tensor([0.5, 0.25, 0.1], dtype=F64)
    assert torch.allclose(schedule.angle(ratio(t, torch.tensor([0.5, 0.25, 0.1], dtype=F64), schedule)).tan(), known)
    assert torch.allclose(ratio(t, 1.0, schedule), t) and torch.equal(ratio(t, 0.0, schedule), 0 * t)


def test_both_sides_are_within_reach_and_within_time():
    t = torch.tensor([0.05, 0.5, 0.97], dtype=F64)[:, None].expand(-1, len(U)).flatten()
    low, high = beside(t, 0.1, U.repeat(3), U.flip(0).repeat(3))
    assert (low <= t).all() and (low >= 0).all() and (high >= t).all() and (high <= 1).all()
    means = [(t - low).reshape(3, -1).mean(1), (high - t).reshape(3, -1).mean(1)]
    assert (means[0].tolist() == pytest.approx([0.025, 0.05, 0.05])
            and means[1].tolist() == pytest.approx([0.05, 0.05, 0.015]))


def test_two_draws_in_order():
    law = log_normal(SCHEDULES["flow"], -0.4, 1.0)
    one, other, alike = law(U), law(U.roll(5000)), U < 0.75
    t, r = ordered(one, other, alike)
    assert ((r <= t).all() and torch.equal(r[alike], t[alike])
            and torch.equal(t + r, torch.where(alike, 2 * t, one + other)))


def test_curricula_begin_and_end_where_they_say():
    for curriculum in (linear(64, 1280), exponential(64, 1280), linear(64, 1280, 0.5), exponential(64, 1280, 0.5),
                       doubling(10, 1280)):
        counts = [curriculum(i / 1000) for i in range(1000)]
        assert counts[0] in (10, 64) and counts[-1] == pytest.approx(1280, rel=0.01) and counts == sorted(counts)
    assert {constant(18)(p) for p in (0.0, 0.5, 0.999)} == {18}
    assert linear(64, 1280)(0.25) == 368 and linear(64, 1280, 0.5)(0.25) == 672
    assert exponential(64, 1280, 0.5)(0.25) == round(sqrt(64 * 1280)) and exponential(64, 1280, 0.5)(0.7) == 1280


def test_doubling_is_the_published_rule():
    """N(k) = min(s0 2^floor(k / K'), s1) + 1 nodes, with K' = floor(K / (log2(s1 / s0) + 1))."""
    total, each = 400_000, 400_000 // 8
    for k in (0, each - 1, each, 3 * each + 7, 7 * each, total - 1):
        assert doubling(10, 1280)(k / total) == min(10 * 2 ** (k // each), 1280)
    assert doubling(10, 1280)(0.99) == 1280 and doubling(3, 10)(0.999) == 10 and ceil(doubling(5, 5)(0.4)) == 5
