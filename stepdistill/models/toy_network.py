"""The network of Toy: the closed-form prediction of a mixture in the plane plus a small network, zero at first."""
from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn

from ..diffusion.contracts import Condition
from ..diffusion.draws import key
from ..diffusion.exact import GaussianMixture
from ..diffusion.schedule import RectifiedFlow, Schedule, VariancePreserving
from ..diffusion.toy import Toy
from ..errors import RequestError

SCHEDULERS = {"vp": DDIMScheduler, "flow": FlowMatchEulerDiscreteScheduler}
WIDTH, DEPTH, WAVES = 128, 3, 8
LAYERS = tuple(f"hidden.{i}" for i in range(DEPTH))


class Waves(nn.Module):
    """Noise levels (B,), as 2 log(sigma / alpha), from about -10 to 10 on the way, -> Fourier features (B, 2 WAVES)."""

    def forward(self, level: Tensor) -> Tensor:
        waves = level[:, None] * 0.15 * 1.6 ** torch.arange(WAVES, device=level.device)
        return torch.cat([waves.sin(), waves.cos()], 1)


class ToyNetwork(nn.Module):
    """The mixture's exact prediction plus an MLP whose last layer is zero at first: a student begins as its teacher
    does.

    forward(x_t (B, 2, 1, 1), t (B,), label (B,), w (B,) or None) -> raw prediction (B, 2, 1, 1). w_in: whether it has a
    layer that reads w. Its first values are a function of nothing: every student of Toy begins alike.
    """

    def __init__(self, mixture: GaussianMixture, classes: int, w_in: bool = False) -> None:
        super().__init__()
        self.mixture, self.classes = mixture, classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key("toy network"))
            self.embed = nn.Linear(2 + 2 * WAVES + classes + 1, WIDTH)
            self.hidden = nn.ModuleList([nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(DEPTH)])
            self.out = nn.Linear(WIDTH, 2)
        self.waves = Waves()
        if w_in:
            self.w_in = nn.Linear(2, WIDTH, bias=False)
        for parameter in (*self.out.parameters(), *(self.w_in.parameters() if w_in else ())):
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        seen = self.waves((-self.mixture.schedule.log_snr(t)).clamp(-12, 12))
        kinds = nn.functional.one_hot(label + 1, self.classes + 1).to(x_t)
        h = self.embed(torch.cat([x_t.flatten(1), seen.to(x_t), kinds], 1))
        if w is not None:
            h = h + self.w_in(torch.stack([w - 1, w.log()], 1).to(h))
        for block in self.hidden:
            h = h + block(h)
        return self.mixture(x_t, t, Condition(label=label)).raw + self.out(nn.functional.silu(h)).reshape(x_t.shape)


def noise_of(scheduler: SchedulerMixin) -> Schedule:
    return VariancePreserving.of(scheduler.alphas_cumprod) if isinstance(scheduler, DDIMScheduler) else RectifiedFlow()


def kind_of(scheduler: SchedulerMixin) -> str:
    """What its mixture predicts, a key of PARAMETERISATIONS."""
    return "v" if isinstance(scheduler, DDIMScheduler) else "velocity"


def open_toy(source: str, dtype: torch.dtype) -> dict[str, Any]:
    """The components of Toy in its folder. RequestError for another dtype than float32."""
    if dtype != torch.float32:
        raise RequestError(f"Toy is computed in float32; found {dtype}: set train.precision to fp32")
    toy = Toy(source)
    scheduler = SCHEDULERS[toy.config["noise"]].from_pretrained(source, subfolder="scheduler")
    network = ToyNetwork(toy.law(noise_of(scheduler), kind_of(scheduler)), int(toy.labels.max()) + 1)
    return {"network": network, "scheduler": scheduler}
