from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler

from stepdistill.diffusion.consistency import consistency, origin, scalings
from stepdistill.diffusion.prediction import Prediction

from .schedules import SCHEDULES


def test_scalings_are_the_scheduler_s():
    scheduler = LCMScheduler()
    timesteps = torch.arange(0, 1000, 3)
    theirs = torch.tensor([scheduler.get_scalings_for_boundary_condition_discrete(t) for t in timesteps.tolist()],
                          dtype=torch.float64)
    ours = torch.stack(scalings(SCHEDULES["vp"], (timesteps + 1).double() / 1000), 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name, kind", [("vp", "eps"), ("vp", "v"), ("vp", "x0"), ("vp-zero", "v"),
                                        ("flow", "velocity")])
def test_at_the_origin_it_is_the_state_whatever_is_predicted(name, kind):
    x, raw = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.full((5,), origin(SCHEDULES[name]), dtype=torch.float64)
    assert torch.equal(consistency(Prediction(raw, x, t, SCHEDULES[name], kind)), x)


def test_on_a_flow_it_is_x0():
    x, raw = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = Prediction(raw, x, torch.linspace(0.1, 1, 5, dtype=torch.float64), SCHEDULES["flow"], "velocity")
    assert torch.equal(consistency(p), p.x0)
