"""A network that is not a neural network, our role on it, and the loop of the stock pipelines around the same
function."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import RectifiedFlow, Schedule, VariancePreserving

SD15 = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1)
KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def network(x: Tensor, timesteps: Tensor) -> Tensor:
    """Smooth, nonlinear, different for every told time (0 .. 1000) and element. x: (B, ...); told: (B,)."""
    t = timesteps.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 1000
    return torch.sin(1.3 * x + 2 * t) + 0.4 * torch.cos(3 * t) * x.roll(1, dims=-1) + 0.1


@dataclass(frozen=True)
class NetworkRole:
    schedule: Schedule
    kind: str

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        flow = isinstance(self.schedule, RectifiedFlow)
        timesteps = 1000 * self.schedule.sigma(t) if flow else self.schedule.nodes * t - 1
        return Prediction(network(x_t, timesteps), x_t, t, self.schedule, self.kind)


def schedule_of(scheduler) -> Schedule:
    return VariancePreserving.of(scheduler.alphas_cumprod) if "beta_start" in scheduler.config else RectifiedFlow()


def stock_loop(scheduler, noise: Tensor, generator: torch.Generator | None = None, eta: float | None = None,
               **grid) -> Tensor:
    """What StableDiffusionPipeline and StableDiffusion3Pipeline do between prepare_latents and decode."""
    scheduler.set_timesteps(**grid)
    flow = "beta_start" not in scheduler.config
    x = noise if flow else noise * scheduler.init_noise_sigma
    random = ({"generator": generator} if generator is not None else {}) | ({} if eta is None else {"eta": eta})
    for t in scheduler.timesteps:
        seen = x if flow else scheduler.scale_model_input(x, t)
        x = scheduler.step(network(seen, t.expand(len(x))), t, x, return_dict=False, **random)[0]
    return x
