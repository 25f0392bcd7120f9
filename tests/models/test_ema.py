from __future__ import annotations

import pytest
import torch

from stepdistill.models.ema import Ema


def test_an_average_is_the_geometric_sum_of_its_leaders_past():
    """After n updates with a constant leader: shadow = decay^n shadow_0 + (1 - decay^n) leader."""
    leader, shadow = [torch.full((3, 2), 5.0), torch.full((1,), -1.0)], [torch.zeros(3, 2), torch.zeros(1)]
    ema = Ema(shadow, leader, decay=0.9)
    for _ in range(7):
        ema.update()
    for mean, value in zip(shadow, leader, strict=True):
        torch.testing.assert_close(mean, (1 - 0.9**7) * value)


def test_without_decay_the_shadow_is_its_leader():
    leader, shadow = [torch.randn(50)], [torch.randn(50)]
    Ema(shadow, leader, decay=0.0).update()
    assert torch.equal(shadow[0], leader[0])


@pytest.mark.parametrize(("shadow", "leader", "decay", "says"), [
    ([torch.zeros(2)], [torch.zeros(2)], 1.5, "decay"),
    ([torch.zeros(2)], [torch.zeros(3)], 0.5, "shapes"),
    ([torch.zeros(2).bfloat16()], [torch.zeros(2).bfloat16()], 0.5, "float32"),
])
def test_what_is_no_average_is_refused(shadow, leader, decay, says):
    with pytest.raises(ValueError, match=says):
        Ema(shadow, leader, decay)
