from __future__ import annotations

import pytest
import torch
from tiny import save_tiny

from stepdistill.models.teacher import load_teacher


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny teachers on disk, by what they predict."""
    return {kind: save_tiny(tmp_path_factory.mktemp("teacher") / kind, kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture
def family(folders):
    return load_teacher(folders["epsilon"])


@pytest.fixture
def inputs(family):
    """x_t, t, cond of three samples; the times are nodes 999, 499 and 19."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *family.latent_shape, generator=generator)
    t = torch.tensor([1000, 500, 20], dtype=torch.float64) / 1000
    return x, t, family.encode(["a red circle", "a blue square", "a green ring on a striped navy background"])


@pytest.fixture
def perturb():
    """Gives parameters values that matter."""
    @torch.no_grad()
    def change(parameters, seed=1, size=0.1):
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return change
