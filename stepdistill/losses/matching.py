"""Losses of distribution matching, one number a sample: (B, ...) in, (B,) out, the mean over all other axes."""
from __future__ import annotations

from torch import Tensor

from ..diffusion.prediction import Prediction, truth
from ..diffusion.schedule import Schedule, like
from .regression import squared


def distribution_matching(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """A loss whose gradient in x is weight (fake - real) over the size of a sample; its value says little.

    real, fake: the teacher's and the critic's x_0 at the noised x, which are held fixed; weight (B,). The reverse KL
    divergence between the noised laws, in x_0: Yin et al. 2024, arXiv:2311.18828, eq. 7; Luo et al. 2023,
    arXiv:2305.18455, eq. 7.
    """
    aim = (x - like(weight, x) * (fake - real)).detach()
    return 0.5 * squared(x, aim)


def score_identity(x: Tensor, real: Tensor, fake: Tensor, alpha: float | Tensor, weight: Tensor) -> Tensor:
    """weight [(1 - alpha) |d|^2 + <d, fake - x>], d = real - fake, over the size of a sample; its value says little.

    real, fake: the teacher's and the critic's x_0 at the noised x; gradients flow through both to x, and through weight
    (B,) and alpha, a number or (B,), if these have any. Where fake is E[x | x_t] and the weight a function of t, the
    expected gradient is, at alpha = 1/2, half of that of E weight |d|^2, the Fisher divergence, and at alpha = 1 the
    same with the law of x_t held fixed; the expected value is (1 - alpha) E weight |d|^2. Zhou et al. 2024,
    arXiv:2404.04057.
    """
    d = real - fake
    share = 1 - (like(alpha, d) if isinstance(alpha, Tensor) else alpha)
    error = (d * (share * d + fake - x)).flatten(1).mean(1)
    return like(weight, error) * error


def denoising(prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """Denoising score matching in the network's own parameterisation, at the x_t that x0 and eps made."""
    return squared(prediction.raw, truth(x0, eps, prediction.t, prediction.schedule, prediction.kind))


def from_state(x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(x_0, eps') for `denoising` at x_t = `Schedule.renoise`(x_s, eps, s, t), where the data are states x_s at s < t.

    The two that make x_t = alpha_t x_0 + sigma_t eps' and whose means given x_t are those of the law of x_t, whatever
    law x_s has: the score of x_t given x_s is -eps over the deviation of the fresh noise, and that of x_t its mean.
    On a flow their velocity is that of Phased DMD (arXiv:2510.27684); at s = 0 they are x_s and eps.
    """
    kept = schedule.alpha(t) / schedule.alpha(s)
    fresh = (schedule.sigma(t) ** 2 - (kept * schedule.sigma(s)) ** 2).sqrt()
    lacking = schedule.sigma(s) ** 2 * kept / fresh
    x0 = like(1 / schedule.alpha(s), x_s) * (x_s - like(lacking, x_s) * eps)
    return x0, like(schedule.sigma(t) / fresh, x_s) * eps


def importance(x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule, temperature: float) -> Tensor:
    """The weight (B,) of a sample at t, under which a critic that is shown x_t = `Schedule.renoise`(x_s, eps, s, t) of
    the student's own state, x_s, denoises the student's x_0, (B, ...) as all three.

    e^((|eps|^2 - |e|^2) / (2 temperature)), where x_t = alpha_t x_0 + sigma_t e: at temperature 1 the density of x_t
    given x_0 alone over that given x_s, but for a factor that is one for all samples at s and t. In many dimensions its
    variance is without bound; the released training of TDM (Luo et al. 2025, arXiv:2503.06674) has their number for a
    temperature.
    """
    e = (x_t - like(schedule.alpha(t), x_t) * x0) / like(schedule.sigma(t), x_t)
    return ((eps.square() - e.square()).flatten(1).sum(1) / (2 * temperature)).exp()
