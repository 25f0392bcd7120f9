from __future__ import annotations

import pytest
import torch
from PIL import Image

from stepdistill.evaluation.clouds import cloud, energy_distance


def normal(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_distance_of_two_normals_is_the_known_one():
    """E|N(m, 2)| = 2 exp(-m^2 / 4) / sqrt(pi) + m erf(m / 2): Székely & Rizzo's distance of N(0, 1) and N(m, 1)."""
    m = torch.tensor(1.5, dtype=torch.float64)
    between = 2 * (-(m**2) / 4).exp() / torch.pi**0.5 + m * (m / 2).erf()
    known = 2 * between - 2 * 2 / torch.pi**0.5
    assert energy_distance(normal(6000, 0), normal(5000, 1, 1.5)) == pytest.approx(known.item(), rel=0.05)


def test_it_has_no_bias_where_the_laws_are_equal():
    found = torch.tensor([energy_distance(normal(100, 2 * i), normal(100, 2 * i + 1)) for i in range(60)])
    assert found.mean().abs() < 4 * found.std() / 60**0.5 and found.min() < 0


def test_clouds_are_drawn_with_their_ways(tmp_path):
    points, labels = torch.randn(50, 2), torch.arange(50) % 2
    panels = {name: (points, labels) for name in ("exact", "1 step", "4 steps")}
    cloud(panels, tmp_path / "c.png", {"4 steps": torch.randn(5, 5, 2)}, columns=2)
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 400 and len(set(picture.convert("RGB").resize((40, 40)).getdata())) > 20
        width, height = picture.size
        last = picture.convert("RGB").crop((width // 2 + 9, height // 2 + 20, width, height))
        assert set(last.getdata()) == {(255, 255, 255)}    # no empty axes
