"""One column of a stock LoRA holds the constant that a told guidance scale adds."""
from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from stepdistill.errors import RequestError
from stepdistill.export.fold import constant, folded
from stepdistill.export.student import Lora

TIMES = torch.arange(1000)


@pytest.mark.parametrize("width", [16, 64, 320])
def test_sinusoids_of_all_told_times_carry_a_constant_in_float32(width):
    s = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)(TIMES)
    u = constant(s.double())
    assert (s @ u.float() - 1).abs().max() < 2e-6
    assert u.abs().max() < 2


def test_features_that_carry_no_constant_are_refused():
    s = torch.linspace(0.1, 1, 1000, dtype=torch.float64)[:, None]
    with pytest.raises(RequestError, match="--to pipeline"):
        constant(s)


@pytest.mark.parametrize("trained", [False, True])
def test_the_folded_layer_is_the_told_layer(trained):
    """linear_1(s + cond_proj e) on the adapted weight equals the stock layer with the folded adapter."""
    generator = torch.Generator().manual_seed(0)
    unet = torch.nn.Module()
    unet.time_proj = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
    unet.time_embedding = TimestepEmbedding(32, 128)
    module, e, cond_proj = "time_embedding.linear_1", torch.randn(256, generator=generator), torch.randn(32, 256, generator=generator)
    state = {f"{module}.lora_A.weight": torch.randn(3, 32, generator=generator) / 6,
             f"{module}.lora_B.weight": torch.randn(128, 3, generator=generator)} if trained else {}
    lora = Lora(state, alpha=5.0, rank=3)
    after = folded(lora, cond_proj, e, unet, TIMES)

    def weight(lora: Lora) -> torch.Tensor:
        a, b = (lora.state.get(f"{module}.lora_{side}.weight") for side in "AB")
        W = unet.time_embedding.linear_1.weight.detach()
        return W if a is None else W + lora.scaling(module) * b @ a

    s = unet.time_proj(TIMES)
    told, stock = (s + cond_proj @ e) @ weight(lora).T, s @ weight(after).T
    torch.testing.assert_close(stock, told, atol=2e-4, rtol=1e-4)
    assert after.rank == 3 and after.metadata()["rank_pattern"] == {r"time_embedding\.linear_1": 4 if trained else 1}
