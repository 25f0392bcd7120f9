"""The schedules that every property is tried under."""
from __future__ import annotations

import torch

from stepdistill.diffusion.schedule import RectifiedFlow, Schedule, TrigFlow, VarianceExploding, VariancePreserving

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)


def zero_terminal_snr() -> VariancePreserving:
    """Lin et al. 2023, arXiv:2305.08891, algorithm 1: sqrt(alphas_cumprod) shifted and stretched to end at 0."""
    root = ALPHAS_CUMPROD.sqrt()
    return VariancePreserving.of(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


SCHEDULES: dict[str, Schedule] = {
    "vp": VariancePreserving.of(ALPHAS_CUMPROD), "vp-zero": zero_terminal_snr(), "flow": RectifiedFlow(),
    "flow-3": RectifiedFlow(shift=3.0), "trig": TrigFlow(), "ve": VarianceExploding(),
}
