"""Losses of distribution matching, one number a sample: (B, ...) in, (B,) out, the mean over all other axes."""
from __future__ import annotations

from torch import Tensor

from ..diffusion.prediction import Prediction, truth
from ..diffusion.schedule import like
from .regression import squared


def distribution_matching(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """A loss whose gradient in x is weight (fake - real) over the size of a sample; its value says little.

    real, fake: the teacher's and the critic's x_0 at the noised x, which are held fixed; weight (B,). The reverse KL
    divergence between the noised laws, in x_0: Yin et al. 2024, arXiv:2311.18828, eq. 7; Luo et al. 2023,
    arXiv:2305.18455, eq. 7.
    """
    aim = (x - like(weight, x) * (fake - real)).detach()
    return 0.5 * squared(x, aim)


def score_identity(x: Tensor, real: Tensor, fake: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """weight [(1 - alpha) |d|^2 + <d, fake - x>], d = real - fake, over the size of a sample; its value says little.

    real, fake: the teacher's and the critic's x_0 at the noised x; gradients flow through both to x. weight (B,), held
    fixed. Where fake is E[x | x_t] and the weight a function of t, the expected gradient is, at alpha = 1/2, half of
    that of E weight |d|^2, the Fisher divergence, and at alpha = 1 the same with the law of x_t held fixed; the
    expected value is (1 - alpha) E weight |d|^2. Zhou et al. 2024, arXiv:2404.04057.
    """
    d = real - fake
    error = (d * ((1 - alpha) * d + fake - x)).flatten(1).mean(1)
    return like(weight, error) * error


def denoising(prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """Denoising score matching in the network's own parameterisation, at the x_t that x0 and eps made."""
    return squared(prediction.raw, truth(x0, eps, prediction.t, prediction.schedule, prediction.kind))
