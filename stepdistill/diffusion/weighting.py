"""Loss weights, in one currency: each multiplies a squared error in x_0.

|d eps|^2 = SNR |d x_0|^2 and |d v|^2 = (SNR + 1) |d x_0|^2, so a weight w on an eps-loss is w SNR here. All are (B,)
float64, of t (B,) in [0, 1], except where they weigh what they are shown.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .schedule import Schedule


def snr(schedule: Schedule, t: Tensor) -> Tensor:
    """alpha^2 / sigma^2: an eps-loss. Infinite at t = 0."""
    return (schedule.alpha(t) / schedule.sigma(t)) ** 2


def snr_plus_one(schedule: Schedule, t: Tensor) -> Tensor:
    """A v-loss, for alpha^2 + sigma^2 = 1."""
    return snr(schedule, t) + 1


def edm(schedule: Schedule, t: Tensor, sigma_data: float) -> Tensor:
    """SNR + 1 / sigma_data^2: Karras et al. 2022, arXiv:2206.00364, table 1, with sigma / alpha for their sigma."""
    return snr(schedule, t) + 1 / sigma_data**2


def truncated_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """max(SNR, 1): Salimans & Ho 2022, arXiv:2202.00512, section 4; the larger of the x_0- and the eps-loss."""
    return snr(schedule, t).clamp(min=1)


def min_snr(schedule: Schedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma): Hang et al. 2023, arXiv:2303.09556."""
    return snr(schedule, t).clamp(max=gamma)


def dmd(x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """1 / mean |x_0 - D_teacher|, (B,) in x0's dtype: Yin et al. 2024, arXiv:2311.18828.

    It multiplies D_fake - D_teacher at the re-noised x_0, and makes that gradient of one size at all noise levels.
    """
    return 1 / (x0 - teacher_x0).abs().flatten(1).mean(1).clamp(min=torch.finfo(x0.dtype).eps)


def uncertain(loss: Tensor, log_variance: Tensor) -> Tensor:
    """loss / e^u + u, u (B,) learned: Karras et al. 2024, arXiv:2312.02696. Least at u = log loss."""
    return loss * (-log_variance).exp() + log_variance
