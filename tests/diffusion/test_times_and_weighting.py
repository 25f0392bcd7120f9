from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion import times, weighting
from stepdistill.diffusion.exact import Gaussian
from stepdistill.diffusion.schedule import RectifiedFlow, like

from .schedules import SCHEDULES

F64 = torch.float64
Z = torch.tensor([-1.5, -0.3, 0.0, 0.8], dtype=F64)
U = torch.special.ndtr(Z)


@pytest.mark.parametrize("name", ["vp", "vp-zero", "flow", "trig", "ve"])
def test_log_normal_has_its_quantiles(name):
    s = SCHEDULES[name]
    t = times.log_normal(s, -1.2, 1.2)(U)
    assert torch.allclose(s.angle(t).tan().log(), -1.2 + 1.2 * Z, atol=1e-8)


def test_logit_normal_and_uniform_have_theirs():
    assert torch.allclose(times.logit_normal(-0.4, 1.3)(U).logit(), -0.4 + 1.3 * Z)
    assert torch.allclose(times.uniform(0.2, 0.6)(U), 0.2 + 0.4 * U)


def test_a_shift_is_that_of_the_shifted_flow():
    u = torch.linspace(0, 1, 9, dtype=F64)
    assert torch.allclose(times.shifted(times.uniform(), 3.0)(u), RectifiedFlow(shift=3.0).sigma(u))


def test_every_law_stays_in_range_at_the_ends_of_u():
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=F64)
    laws = [times.uniform(), times.logit_normal(), times.log_normal(SCHEDULES["vp"]), times.discrete(times.nodes(7)),
            times.shifted(times.logit_normal(), 5.0)]
    for law in laws:
        t = law(u)
        assert torch.isfinite(t).all() and (0 <= t).all() and (t <= 1).all()


def test_a_grid_gives_each_node_its_share():
    u = (torch.arange(700, dtype=F64) + 0.5) / 700
    t = times.discrete(times.nodes(7))(u)
    assert torch.equal(t.unique(), times.nodes(7)) and t.unique(return_counts=True)[1].tolist() == [100] * 7


def test_a_weighted_grid_gives_each_node_its_own():
    u = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    t = times.weighted(times.nodes(4).flip(0), (0.7, 0.0, 0.1, 0.2))(u)
    assert [(t == node).sum().item() for node in (1.0, 0.75, 0.5, 0.25)] == [700, 0, 100, 200]
    assert (times.weighted(times.nodes(4), (0.0, 0.0, 0.5, 0.5))(torch.tensor([0.0, 1 - 2.0**-53], dtype=F64)).tolist()
            == [0.75, 1.0])


@pytest.mark.parametrize("name, top", [("ve", 80.0), ("flow", 80.0), ("vp", 14.0)])
def test_the_karras_grid_is_that_of_the_paper(name, top):
    s = SCHEDULES[name]
    sigma = s.angle(times.karras(s, 18, 0.02, top)).tan()
    roots = sigma ** (1 / 7)
    assert sigma[0] == pytest.approx(top) and sigma[-1] == pytest.approx(0.02)
    assert torch.allclose(roots.diff(), (0.02 ** (1 / 7) - top ** (1 / 7)) / 17 * torch.ones(17, dtype=F64), atol=1e-9)


def test_a_karras_grid_beyond_the_schedule_is_refused():
    with pytest.raises(ValueError, match="14.6"):
        times.karras(SCHEDULES["vp"], 18)


@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_turn_x0_errors_into_those_of_other_views(name):
    s, t = SCHEDULES[name], torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    one, two = (Gaussian(s, torch.full((4,), m, dtype=F64), torch.ones(4, dtype=F64))(x, t) for m in (0.0, 1.0))
    square = lambda a, b: ((a - b) ** 2).sum(1)
    in_x0, in_eps = square(one.x0, two.x0), square(one.eps, two.eps)
    assert torch.allclose(weighting.snr(s, t) * in_x0, in_eps)
    assert torch.allclose(weighting.truncated_snr(s, t) * in_x0, torch.maximum(in_x0, in_eps))
    assert torch.allclose(weighting.min_snr(s, t) * in_x0, torch.minimum(5 * in_x0, in_eps))
    if name in ("vp", "vp-zero", "trig"):
        assert torch.allclose(weighting.snr_plus_one(s, t) * in_x0, square(one.v, two.v))


def test_the_dmd_normaliser_takes_out_the_scale_of_each_sample():
    x, d = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    weight = weighting.dmd(x, d)
    assert weight.shape == (3,)
    assert torch.allclose((like(weight, x) * (x - d)).abs().flatten(1).mean(1), torch.ones(3))
    assert torch.allclose(weighting.dmd(2 * x, 2 * d), weight / 2)
    assert torch.isfinite(weighting.dmd(x, x)).all()


def test_the_learned_variance_is_least_where_it_equals_the_loss():
    loss = torch.tensor([0.1, 3.0])
    u = loss.log().requires_grad_()
    weighting.uncertain(loss, u).sum().backward()
    assert torch.allclose(u.grad, torch.zeros(2), atol=1e-6)
    assert (weighting.uncertain(loss, u + 0.1) > weighting.uncertain(loss, u)).all()


@pytest.mark.parametrize("name", ["vp", "vp-zero", "flow"])
@pytest.mark.parametrize("law", times.NOISE_LAWS)
@pytest.mark.parametrize("t_range", [(0.0, 1.0), (0.02, 0.9)])
def test_a_law_of_noise_levels_is_what_its_name_says(name, law, t_range):
    """Against draws of the continuous law, each moved to the nearest time that networks know, those outside t_range
    left out."""
    s, u = SCHEDULES[name], (torch.arange(400_000, dtype=F64) + 0.5) / 400_000
    near = lambda t: (1000 * t).round().clamp(1, 1000) / 1000
    low, high = (times.levels(*t_range)[i] for i in (0, -1))
    kept = lambda t: t[(t > low - 1e-9) & (t < high + 1e-9)]
    cut = {"uniform": times.discrete(times.levels(*t_range))(u),
           "lognormal": kept(near(times.log_normal(s, -0.8, 1.4)(u))),
           "shifted": kept(near(times.shifted(times.uniform(), 2.5)(u)))}
    mean = lambda t: torch.stack([t.mean(), (t**2).mean(), (t < 0.3).double().mean()])
    known = (mean(cut["uniform"]) + mean(cut["lognormal"])) / 2 if law == "mixture" else mean(cut[law])
    found = times.noise_law(law, s, t_range, mean=-0.8, std=1.4, shift=2.5)(u)
    assert torch.allclose(mean(found), known, atol=2e-3), (mean(found), known)
    assert low <= found.min() and found.max() <= high and torch.allclose(near(found), found)


def test_a_uniform_law_is_that_of_the_stock_times():
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert torch.equal(times.noise_law("uniform", SCHEDULES["vp"], (0.02, 0.98))(u),
                       times.discrete(times.levels(0.02, 0.98))(u))


def test_a_law_that_is_none_is_refused():
    with pytest.raises(ValueError, match="one of uniform, lognormal, shifted, mixture; found 'cosine'"):
        times.noise_law("cosine", SCHEDULES["vp"])
    with pytest.raises(ValueError, match="puts no draw in t_range"):
        times.noise_law("lognormal", SCHEDULES["vp"], (0.9, 1.0), mean=-9.0, std=0.1)
